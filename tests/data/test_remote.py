"""Data in stores: the same order as on this machine, whatever fails in between, and one line where it cannot go on."""

import hashlib
import json
import os
import pickle
import resource
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import _http

from selfe import cli, config
from selfe.data.dataset import BucketedDataset
from selfe.data.loader import MicroBatches, make_loader, raise_if_error
from selfe.data.manifest import ManifestData
from selfe.data.shards import ShardData
from selfe.data.tables import TableData
from selfe.distributed.collectives import World
from selfe.errors import UserError
from selfe.io import feature_cache, storage
from selfe.io.disk_cache import SLOTS, DiskCache
from selfe.io.storage import RemotePath, as_path
from tests.helpers import stores
from tests.helpers.images import manifest
from tests.helpers.ranks import on_ranks
from tests.helpers.short_runs import LAST, assert_resumed, train_and_resume
from tests.helpers.train_processes import ROOT, files, lines

REPO = "lab/data"
IMAGES, BATCH, IN_SHARD = 200, 20, 40
STEPS = IMAGES // BATCH  # of an epoch


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """200 images, their manifest and five shards of them."""
    folder = tmp_path_factory.mktemp("images")
    path = manifest(folder, [(24 + 8 * (i % 3), 32) for i in range(IMAGES)], columns=True)
    out = ["--out", str(folder / "s"), "--samples", str(IN_SHARD)]
    cli.run(["make-shards", str(path), "--base-dir", str(folder), *out])
    return folder


@pytest.fixture(scope="module")
def s3() -> Iterator[stores.Store]:
    with stores.s3() as store:
        yield store


@pytest.fixture
def store(s3) -> stores.Store:
    s3.empty()
    return s3


def samples_at(step: int) -> range:
    return range(BATCH * step, BATCH * step + BATCH)


def seen(data: BucketedDataset, steps: range, ranks: int, workers: int = 0) -> list[tuple]:
    """(step, position, caption, digest of the pixels) of every sample of some steps, from all ranks."""
    samples = []
    for rank in range(ranks):
        world = World(rank, ranks, torch.device("cpu"))
        part = MicroBatches(data, 0, samples_at, BATCH // ranks, 1, world, "train")
        for step, batch in zip(steps, make_loader(part, [(step, 0) for step in steps], workers), strict=True):
            batch = raise_if_error(batch)
            pixels = [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in batch.images]
            samples += zip([step] * len(pixels), batch.positions, batch.prompts, pixels, strict=True)
    return sorted(samples)


def test_three_epochs_with_faults_are_those_of_local_files(folder, store, tmp_path):
    """On 1, 2 and 4 ranks, resumed on each other, from a cache that is smaller than the data."""
    for tar in sorted((folder / "s").glob("*.tar")):
        store.put(tar)
    local = ShardData(folder / "s" / "train-*.tar", pixels=1024, flip=True)
    store.faults.every, store.faults.kinds = 7, ("throttled", "cut")
    size, samples = sum(path.stat().st_size for path in folder.glob("*.jpg")), []

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    options = {"pixels": 1024, "flip": True, "cache_dir": tmp_path, "cache_gb": 0.00012}
    for epoch, ranks in enumerate((1, 2, 4)):
        remote = ShardData("s3://data/train-*.tar", **options)
        samples += seen(remote, epoch_steps(epoch), ranks)
        cached = [path.stat().st_size for path in (tmp_path / "files").rglob("*") if path.is_file()]
        assert 4e4 < sum(cached) <= 1.2e5
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024

    assert samples == [sample for epoch in range(3) for sample in seen(local, epoch_steps(epoch), 1)]
    assert set(Counter(caption for _, _, caption, _ in samples).values()) == {3}
    assert store.faults.requests > 2 * IMAGES  # more than once for each
    assert grown < 200e6
    print(f"{size / 1e6:.2f} MB of images, {store.faults.requests} requests; memory grew by {grown / 1e6:.0f} MB")


def epoch_steps(epoch: int) -> range:
    return range(STEPS * epoch, STEPS * (epoch + 1))


def test_manifests_and_images_in_a_store(folder, store, tmp_path):
    """Of one epoch, read by workers; the manifest is on this machine or in the store, its images are in the store."""
    few = range(0, 60)
    lines = (folder / "train.tsv").read_text().splitlines()[: len(few)]
    (tmp_path / "few.tsv").write_text("\n".join(lines) + "\n")
    for number in few:
        store.put(folder / f"train_{number:04d}.jpg", f"images/train_{number:04d}.jpg")
    store.put(tmp_path / "few.tsv")
    expected = seen(ManifestData(tmp_path / "few.tsv", folder, pixels=1024), range(3), 1)

    options = {"pixels": 1024, "cache_dir": tmp_path / "cache"}
    for path, workers in (("s3://data/few.tsv", 1), (tmp_path / "few.tsv", 0)):
        data = ManifestData(path, "s3://data/images", **options)
        assert seen(data, range(3), 1, workers) == expected
    urls = "\n".join(f"s3://data/images/{line}" for line in lines)
    (tmp_path / "urls.tsv").write_text(urls)
    data = ManifestData(tmp_path / "urls.tsv", folder, **options)
    assert seen(pickle.loads(pickle.dumps(data)), range(3), 1) == expected
    assert data.sources["train"][0].name(3) == "s3://data/images/train_0003.jpg"


def test_tables_in_a_store(folder, store, tmp_path):
    images = [{"bytes": (folder / f"train_{i:04d}.jpg").read_bytes(), "path": None} for i in range(60)]
    table = pyarrow.table({"image": images, "text": [f"drawing {i}" for i in range(60)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=16)
    with pyarrow.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as stream:
        stream.write_table(table, max_chunksize=16)

    store.faults.every, store.faults.kinds = 4, ("cut", "throttled")
    for name in ("a.parquet", "a.arrow"):
        expected = seen(TableData(tmp_path / name, pixels=1024, cache_dir=tmp_path / "c"), range(3), 1)
        data = TableData(store.put(tmp_path / name), pixels=1024, cache_dir=tmp_path / "cache")
        assert seen(data, range(3), 2) == expected
        assert data.sources["train"][0].name(5) == f"s3://data/{name}, row 6"


def test_a_web_server_is_read_in_ranges(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "sleep", lambda seconds: None)
    expected = seen(ShardData(folder / "s" / "train-{000000..000001}.tar", pixels=1024), range(3), 1)
    faults = stores.Faults(stores.folder_app(folder))
    faults.every, faults.kinds = 5, ("throttled", "cut")
    with stores.serving(faults) as address:
        storage.filesystem.cache_clear()
        data = ShardData(f"{address}/s/train-{{000000..000001}}.tar", pixels=1024, cache_dir=tmp_path)
        assert seen(data, range(3), 1) == expected
        with pytest.raises(UserError, match=r"2 of 4 files are missing, the first is http://.*/s/train-000005.tar"):
            ShardData(f"{address}/s/train-{{000003..000006}}.tar", pixels=1024, cache_dir=tmp_path)
    with stores.serving(stores.folder_app(folder, ranges=False)) as address:
        path = RemotePath(f"{address}/s/train-000000.tar")
        with pytest.raises(UserError, match=r"train-000000.tar: the server does not support byte ranges; use one that"):
            path.read(512, 100)


def from_store(world: World, environment: dict[str, str], runs: dict, folder: str) -> dict:
    os.environ |= environment
    storage.sleep = lambda seconds: None
    return train_and_resume(world, runs, folder)


def test_a_run_on_two_ranks_from_a_store_is_that_of_local_files_also_when_resumed(folder, store, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for tar in sorted((folder / "s").glob("*.tar")):
        store.put(tar)
    store.faults.every, store.faults.kinds = 7, ("throttled", "cut")
    manifests = {"local": folder / "s/train-*.tar", "remote": "s3://data/train-*.tar"}
    runs = {}
    for name, place in manifests.items():
        data = {"train_manifest": str(place), "pixels": 1024, "cache_dir": str(tmp_path / f"{name} cache")}
        own = [f"data={{module: selfe.data.shards.ShardData, params: {json.dumps(data)}}}"]
        runs[name] = ["trainer.num_workers=0", *own]
    environment = stores.ENVIRONMENT | {"AWS_ENDPOINT_URL": store.address}
    on_ranks(2, from_store, environment, runs, str(tmp_path))
    for name in runs:
        assert_resumed(tmp_path / name)
    local, remote = (tmp_path / name / "once" for name in runs)
    assert files(local / LAST) == files(remote / LAST)
    assert lines(local) == lines(remote)
    assert store.faults.requests > 0


@contextmanager
def other_store(scheme: str, app: Callable, patch: pytest.MonkeyPatch) -> Iterator[str]:
    """A store of this machine that URLs of a scheme are read from; yields the start of its URLs."""
    patch.setattr(storage, "sleep", lambda seconds: None)
    storage.filesystem.cache_clear()
    with stores.serving(app) as address:
        if scheme == "gs":
            patch.setenv("STORAGE_EMULATOR_HOST", address)
            yield f"gs://{stores.BUCKET}"
        else:
            patch.setattr(_http.time, "sleep", lambda seconds: None)
            patch.setattr(constants, "ENDPOINT", address)
            template = "/{repo_id}/resolve/{revision}/{filename}"
            patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + template)
            yield f"hf://datasets/{REPO}"
    storage.filesystem.cache_clear()


@pytest.mark.parametrize("scheme", ["gs", "hf"])
def test_google_storage_and_the_hugging_face_hub_are_read_as_local_files(scheme, folder, tmp_path, monkeypatch):
    """Shards by a pattern, a manifest and its images, and what is not there."""
    if scheme == "gs":
        pytest.importorskip("gcsfs")
    faults = stores.Faults(stores.gcs_app(folder) if scheme == "gs" else stores.hub_app(folder, REPO))
    if scheme == "hf":
        faults.every, faults.kinds = 9, ("throttled", "cut")
    (folder / "few.tsv").write_text("\n".join((folder / "train.tsv").read_text().splitlines()[:20]) + "\n")
    options = {"pixels": 1024, "cache_dir": tmp_path}
    with other_store(scheme, faults, monkeypatch) as url:
        shards = ShardData(f"{url}/s/train-*.tar", **options)
        assert seen(shards, range(3), 2) == seen(ShardData(folder / "s/train-*.tar", pixels=1024), range(3), 1)
        assert faults.requests >= 3 * BATCH
        images = ManifestData(f"{url}/few.tsv", url, **options)
        assert seen(images, range(1), 1) == seen(ManifestData(folder / "few.tsv", folder, pixels=1024), range(1), 1)
        with pytest.raises(UserError, match=f"{url}/none.tsv: no such manifest"):
            ManifestData(f"{url}/none.tsv", **options)


@pytest.mark.parametrize(
    ("scheme", "remedy"), [("gs", "run gcloud auth application-default login"), ("hf", "set HF_TOKEN, and accept")]
)
def test_a_store_that_refuses_access_is_one_line_at_once(scheme, remedy, monkeypatch):
    if scheme == "gs":
        pytest.importorskip("gcsfs")

    def refuse(environ, start_response):
        if environ["PATH_INFO"] == f"/api/datasets/{REPO}":
            return stores.as_json(start_response, {"id": REPO, "sha": "0" * 40, "siblings": []})
        return stores.as_json(start_response, {"error": {"message": "no access"}}, "403 Forbidden")

    with other_store(scheme, refuse, monkeypatch) as url:
        with pytest.raises(UserError, match=rf"^{url}/a.tar: access is refused \(.*\); {remedy}") as raised:
            RemotePath(f"{url}/a.tar").stat(patience=600)
        assert "\n" not in str(raised.value)


def test_check_data_reads_what_is_in_a_store(folder, store, tmp_path, capsys):
    url = store.put(sorted((folder / "s").glob("*.tar"))[0])
    lines = (folder / "train.tsv").read_text().splitlines()[:3]
    (tmp_path / "few.tsv").write_text("\n".join([*lines, "none.jpg\tx"]) + "\n")
    for number in range(3):
        store.put(folder / f"train_{number:04d}.jpg", f"images/train_{number:04d}.jpg")
    options = ["--workers", "0", "--min-side", "8", "--cache-dir", str(tmp_path / "cache")]
    cli.run(["check-data", url, *options])
    assert f"{IN_SHARD} valid samples, 0 with problems" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.run(["check-data", store.put(tmp_path / "few.tsv"), "--base-dir", "s3://data/images", *options])
    printed = capsys.readouterr().out
    assert "missing: line 4: s3://data/images/none.jpg: no such image; correct the line or --base-dir" in printed
    assert "3 valid lines, 1 with problems" in printed


def test_stamps_of_cached_features_notice_another_version(folder, store):
    path = RemotePath(store.put(folder / "train_0000.jpg", "x.jpg"))
    stamp = feature_cache.file_stamp((path, 0, None))
    assert not feature_cache.has_changed(stamp, (path, 0, None))
    store.put(folder / "train_0001.jpg", "x.jpg")
    assert feature_cache.has_changed(stamp, (RemotePath(path.url), 0, None))
    assert feature_cache.file_stamp((RemotePath(f"{store.url}/none.jpg"), 0, None)) == feature_cache.ABSENT


def test_an_object_that_changes_ends_the_run_and_is_indexed_again(folder, store, tmp_path):
    tars = sorted((folder / "s").glob("*.tar"))
    url = store.put(tars[0], "x.tar")
    data = ShardData(url, pixels=1024, cache_dir=tmp_path)
    seen(data, range(1), 1)
    store.put(tars[1], "x.tar")
    with pytest.raises(UserError) as raised:
        seen(data, range(1, 2), 1)
    assert "s3://data/x.tar, image at byte " in str(raised.value)
    assert str(raised.value).endswith(
        ": differs from the index; it has changed or is damaged: run the same command again to index it anew"
    )
    again = ShardData(url, pixels=1024, cache_dir=tmp_path)
    assert {caption for _, _, caption, _ in seen(again, range(2), 1)} == {
        f"drawing {i}" for i in range(IN_SHARD, 2 * IN_SHARD)
    }


def test_an_interrupted_index_resumes_after_the_last_file(folder, store, tmp_path, monkeypatch):
    for tar in sorted((folder / "s").glob("*.tar"))[:3]:
        store.put(tar)
    fetched, download = [], storage.download

    def fail_at_third(source: RemotePath, file: object) -> None:
        fetched.append(source.name)
        if len(fetched) == 3:
            raise UserError("interrupted")
        download(source, file)

    monkeypatch.setattr(storage, "download", fail_at_third)
    with pytest.raises(UserError, match="interrupted"):
        ShardData("s3://data/train-*.tar", pixels=1024, cache_dir=tmp_path)
    assert len(ShardData("s3://data/train-*.tar", pixels=1024, cache_dir=tmp_path).sources["train"][0]) == 3 * IN_SHARD
    assert fetched == [f"train-{number:06d}.tar" for number in (0, 1, 2, 2)]
    assert [path.suffix for path in (tmp_path / "indices").iterdir()].count(".index") == 1
    assert not list((tmp_path / "copies").iterdir())


# ---- what cannot be read ----


def test_an_unreachable_store_is_one_line_without_credentials(monkeypatch, capfd):
    for name, value in (stores.ENVIRONMENT | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage, "OPENING", 0.0)
    storage.filesystem.cache_clear()
    with pytest.raises(
        UserError, match=r"^s3://data/x.tar: cannot be read \(.*127.0.0.1:9.*\), after tries over"
    ) as raised:
        RemotePath("s3://data/x.tar").stat(patience=0)
    storage.filesystem.cache_clear()
    printed = str(raised.value) + "".join(capfd.readouterr())
    assert "\n" not in str(raised.value)
    assert not [value for name, value in stores.ENVIRONMENT.items() if "KEY" in name and value in printed]


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("train.tsv", "AccessDenied", r"access is refused \(.*\); set AWS_ACCESS_KEY_ID"),
        ("none.tsv", None, "s3://data/none.tsv: no such manifest"),
        ("none-*.tar", None, r"s3://data/none-\*.tar: no such tar file"),
    ],
)
def test_what_is_refused_or_missing_is_one_line(store, tmp_path, name, code, message):
    if code:
        store.faults.app = refusing(code)
    data = ShardData if name.endswith(".tar") else ManifestData
    with pytest.raises(UserError, match=message) as raised:
        data(f"s3://data/{name}", pixels=1024, cache_dir=tmp_path)
    assert "\n" not in str(raised.value)


def test_a_damaged_file_in_a_store_is_named_by_its_url(folder, store, tmp_path):
    (tmp_path / "cut.tar").write_bytes(sorted((folder / "s").glob("*.tar"))[0].read_bytes()[:20_480])
    with pytest.raises(UserError, match=r"^s3://data/cut.tar: not a complete, uncompressed tar file"):
        ShardData(store.put(tmp_path / "cut.tar"), pixels=1024, cache_dir=tmp_path / "cache")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UserError, match=r"^s3://data/cut.parquet: .*; write or download the file again"):
        TableData(store.put(tmp_path / "cut.parquet"), pixels=1024, cache_dir=tmp_path / "cache")


def refusing(code: str):
    def app(environ, start_response):
        content = f"<Error><Code>{code}</Code><Message>Access Denied</Message></Error>".encode()
        start_response("403 Forbidden", [("Content-Type", "application/xml"), ("Content-Length", str(len(content)))])
        return [b""] if environ["REQUEST_METHOD"] == "HEAD" else [content]

    return app


def test_urls_with_credentials_are_refused_and_never_shown():
    secret = "s3cr3t"
    for url in (f"https://user:{secret}@host/a.tar", f"https://host/a.tar?X-Amz-Signature={secret}"):
        with pytest.raises(UserError, match="contains credentials; give them to the store's own tools") as raised:
            as_path(url)
        assert secret not in str(raised.value)
        assert secret not in str(RemotePath(url)) + repr(RemotePath(url))
        assert secret not in storage.describe(OSError(f"GET {url}: refused"))


def test_other_paths_of_a_config_are_not_urls():
    smoke = Path(__file__).parents[2] / "configs/debug/selfe_smoke.yaml"
    with pytest.raises(UserError, match=r"trainer.output_dir: expected a path of this machine, got a URL"):
        config.check(smoke, ["trainer.output_dir=s3://data/run"], ["trainer"])
    config.check(smoke, ["data.params.train_manifest=s3://data/train.tsv"], ["data"])


# ---- the cache ----


def test_the_cache_keeps_what_was_used_last_within_its_size(tmp_path):
    room = 40_000
    cache = DiskCache(tmp_path, SLOTS * room)
    content = os.urandom(1000)
    keys = [key for key in map(str, range(4000)) if cache.path(key).parent.name == "03"][:100]
    for key in keys:
        assert cache.read(key, lambda: content) == content
        assert cache.read(keys[0], lambda: pytest.fail("was removed")) == content
        files = list(cache.path(key).parent.iterdir())
        assert sum(path.stat().st_size for path in files) <= room
    kept = [key for key in keys if cache.path(key).exists()]
    assert kept[0] == keys[0]
    assert kept[1:] == keys[-len(kept) + 1 :]
    with pytest.raises(ZeroDivisionError):
        cache.read("new", lambda: 1 / 0)
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"file: the cache of remote data cannot be written .*; set data.params.cache_dir"
    ):
        DiskCache(tmp_path / "file").read("key", bytes)


def test_range_files_seek_like_others(folder, tmp_path):
    with stores.serving(stores.folder_app(folder)) as address:
        storage.filesystem.cache_clear()
        content = (folder / "train.tsv").read_bytes()
        with RemotePath(f"{address}/train.tsv").open() as file:
            assert file.read(10) == content[:10]
            assert file.seek(-20, os.SEEK_END) == len(content) - 20
            assert file.read() == content[-20:]
            assert file.seek(5) == 5
            assert file.readline() == content[5:].splitlines(keepends=True)[0]
