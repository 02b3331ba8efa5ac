"""Constructor signatures, of imported classes or read from source files without importing anything.

Importing the parts of a model takes seconds; reading their source takes milliseconds, so that a launcher can report a
mistake in a config at once. What cannot be read from the source has the type `Any`, and is checked after the import.
"""

from __future__ import annotations

import ast
import inspect
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any, Literal, Optional, Union, get_type_hints

# names that annotations refer to, besides classes of other modules
BUILTINS = {kind.__name__: kind for kind in (int, float, str, bool, list, tuple, dict)}
LIBRARY = {
    "pathlib.Path": Path,
    "typing.Literal": Literal,
    "typing.Optional": Optional,
    "typing.Union": Union,
}
NO_CONSTRUCTOR = ("typing.Protocol", "typing.Generic", "typing_extensions.Protocol", "abc.ABC")
MOST_IMPORTS = 20  # modules that a name is followed through, which ends circles


@dataclass(frozen=True)
class Parameter:
    """A parameter of a constructor."""

    type: Any
    required: bool


def of(target: Callable) -> dict[str, Parameter] | None:
    """The parameters of a class or function by name; None if the source does not define them."""
    if inspect.isclass(target) and issubclass(target, SourceClass):
        return target.parameters()
    hints = type_hints(target)
    parameters = inspect.signature(target).parameters
    return {
        name: Parameter(hints.get(name, Any), parameter.default is parameter.empty)
        for name, parameter in parameters.items()
        if name != "self"
    }


def type_hints(target: Callable) -> dict[str, Any]:
    """The types of the parameters of a class or function by name."""
    if inspect.isclass(target) and not is_dataclass(target):
        return get_type_hints(target.__init__)
    return get_type_hints(target)  # fields that a dataclass inherits are evaluated in the module of their class


class SourceClass:
    """A class known from its source. It is itself a class, so that it can be part of type annotations."""

    module: SourceModule
    node: ast.ClassDef

    @classmethod
    def is_dataclass(cls) -> bool:
        """Whether it, or the class that it extends, is a dataclass."""
        base = cls.base()
        return bool(cls.dataclass_decorators()) or (is_source_class(base) and base.is_dataclass())

    @classmethod
    def dataclass_decorators(cls) -> list[ast.expr]:
        """The `@dataclass` of the class, if it has one."""
        names = [(node, node.func if isinstance(node, ast.Call) else node) for node in cls.node.decorator_list]
        return [node for node, name in names if ast.unparse(name) in ("dataclass", "dataclasses.dataclass")]

    @classmethod
    def base(cls) -> Any:
        """The class that it extends; None without one, `Any` if there are several or it is not known."""
        bases = [node for node in cls.node.bases if not cls.module.names_any(node, NO_CONSTRUCTOR)]
        if not bases:
            return None
        return cls.module.evaluate(bases[0]) if len(bases) == 1 else Any

    @classmethod
    def parameters(cls) -> dict[str, Parameter] | None:
        """Parameters of the constructor; None if the source does not define them."""
        methods = [node for node in cls.node.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        constructors = [node for node in methods if node.name in ("__init__", "__new__")]
        decorators = cls.dataclass_decorators()
        if cls.node.keywords or len(cls.node.decorator_list) > len(decorators):
            return None  # a metaclass or a decorator may change the constructor

        if constructors:
            (constructor, *others) = constructors
            return None if others or constructor.name == "__new__" else cls.arguments(constructor)

        # what the base class takes; a dataclass adds its fields
        base = cls.base()
        if base is not None and not is_source_class(base):
            return None
        inherited = base.parameters() if base is not None else {}
        if not decorators or inherited is None:
            return inherited
        return None if "init=False" in ast.unparse(decorators[0]) else inherited | cls.fields()

    @classmethod
    def arguments(cls, function: ast.FunctionDef) -> dict[str, Parameter] | None:
        """The arguments of `__init__`; None if it takes any, or is decorated."""
        given = function.args
        if given.vararg or given.kwarg or function.decorator_list:
            return None

        positional = [*given.posonlyargs, *given.args]
        defaults = [None] * (len(positional) - len(given.defaults)) + given.defaults
        pairs = [*zip(positional, defaults, strict=True), *zip(given.kwonlyargs, given.kw_defaults, strict=True)]
        return {
            argument.arg: Parameter(cls.module.evaluate(argument.annotation), default is None)
            for argument, default in pairs[1:]
        }

    @classmethod
    def fields(cls) -> dict[str, Parameter]:
        """The fields of a dataclass that its constructor takes."""
        fields = {}
        for node in cls.node.body:
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            if any(name in ast.unparse(node.annotation) for name in ("ClassVar", "KW_ONLY")):
                continue

            value, required = node.value, node.value is None
            if isinstance(value, ast.Call) and ast.unparse(value.func) in ("field", "dataclasses.field"):
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in value.keywords}
                if options.get("init") == "False":
                    continue
                required = not options.keys() & {"default", "default_factory"}
            fields[node.target.id] = Parameter(cls.module.evaluate(node.annotation), required)
        return fields


def is_source_class(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, SourceClass)


class SourceModule:
    """The names that a module defines or imports at its top level."""

    def __init__(self, name: str, path: Path):
        self.name, self.is_package = name, path.name == "__init__.py"
        self.names: dict[str, list[ast.stmt]] = {}
        self.is_open = False  # it may have names that its source does not show
        for node in statements(ast.parse(path.read_bytes(), str(path)).body):
            self.add(node)

    def add(self, node: ast.stmt) -> None:
        """Record the names that a statement defines."""
        names = []
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            names = [node.name]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.asname or alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
        elif not isinstance(node, (ast.Expr, ast.Pass)):
            self.is_open = True

        for name in names:
            self.names.setdefault(name, []).append(node)
            self.is_open |= name in ("*", "__getattr__")

    def lookup(self, name: str, depth: int = 0) -> Any:
        """What a name stands for: a type, a `SourceModule`, or `Any` if the source does not define it."""
        nodes = self.names.get(name, [])
        if not nodes and name in BUILTINS:
            return BUILTINS[name]
        if len(nodes) != 1 or depth > MOST_IMPORTS:
            return Any

        (node,) = nodes
        if isinstance(node, ast.ClassDef):
            return source_class(self, node)
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            return self.evaluate(node.value, depth + 1)
        if isinstance(node, ast.Import):
            alias = next(alias for alias in node.names if name in (alias.asname, alias.name.partition(".")[0]))
            return module(alias.name if alias.asname else name) or Any
        if isinstance(node, ast.ImportFrom):
            alias = next(alias for alias in node.names if name in (alias.asname, alias.name))
            return member(self.absolute(node), alias.name, depth + 1)
        return Any

    def absolute(self, node: ast.ImportFrom) -> str:
        """The module that `from ... import` names, which may be relative to this one."""
        if not node.level:
            return node.module
        above = self.name.split(".")
        above = above[: len(above) - node.level + self.is_package]
        return ".".join([*above, *([node.module] if node.module else [])])

    def dotted(self, node: ast.expr) -> str:
        """The dotted path of a name as it was imported, such as `typing.Literal`; empty for other expressions."""
        if isinstance(node, ast.Attribute):
            base = self.dotted(node.value)
            return base and f"{base}.{node.attr}"
        if not isinstance(node, ast.Name):
            return ""

        for statement in self.names.get(node.id, []):
            for alias in getattr(statement, "names", []):
                if node.id == (alias.asname or alias.name):
                    prefix = f"{self.absolute(statement)}." if isinstance(statement, ast.ImportFrom) else ""
                    return prefix + alias.name
        return ""

    def names_any(self, node: ast.expr, dotted: Sequence[str]) -> bool:
        """Whether an expression, without its subscript, is one of these dotted paths."""
        return self.dotted(node.value if isinstance(node, ast.Subscript) else node) in dotted

    def evaluate(self, node: ast.expr | None, depth: int = 0) -> Any:
        """The type that an annotation stands for; `Any` if the source does not define it."""
        kind = self.resolve(node, depth)
        return Any if isinstance(kind, SourceModule) else kind

    def resolve(self, node: ast.expr | None, depth: int) -> Any:
        """As `lookup`, of an expression."""
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str):
                return self.evaluate(ast.parse(node.value, mode="eval").body, depth)
            return types.NoneType if node.value is None else Any
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            return self.evaluate(node.left, depth) | self.evaluate(node.right, depth)
        if isinstance(node, (ast.Name, ast.Attribute)):
            if (dotted := self.dotted(node)) in LIBRARY:
                return LIBRARY[dotted]
            if isinstance(node, ast.Name):
                return self.lookup(node.id, depth)
            owner = self.resolve(node.value, depth)
            return owner.lookup(node.attr, depth + 1) if isinstance(owner, SourceModule) else Any
        if isinstance(node, ast.Subscript):
            return self.evaluate_subscript(node, depth)
        return Any

    def evaluate_subscript(self, node: ast.Subscript, depth: int) -> Any:
        """Types with arguments: `Literal`, `Union`, `Optional`, `tuple`, `list`, `dict`."""
        base = self.evaluate(node.value, depth)
        items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if base is Literal:
            constants = [item.value for item in items if isinstance(item, ast.Constant)]
            return Literal[tuple(constants)] if len(constants) == len(items) else Any
        if base not in (Union, Optional, tuple, list, dict):
            return Any

        arguments = []
        for item in items:
            ellipsis = isinstance(item, ast.Constant) and item.value is Ellipsis
            arguments.append(Ellipsis if ellipsis else self.evaluate(item, depth))
        return base[tuple(arguments) if len(arguments) > 1 else arguments[0]]


def statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, with those inside `if` and `try`."""
    for node in body:
        if isinstance(node, (ast.If, ast.Try)):
            handlers = [statement for handler in getattr(node, "handlers", []) for statement in handler.body]
            yield from statements([*node.body, *handlers, *node.orelse, *getattr(node, "finalbody", [])])
        else:
            yield node


@cache
def source_class(owner: SourceModule, node: ast.ClassDef) -> type[SourceClass]:
    """The class of a definition, with the names that messages show."""
    names = {"module": owner, "node": node, "__module__": owner.name, "__qualname__": node.name}
    return type(node.name, (SourceClass,), names)


@cache
def module(name: str) -> SourceModule | None:
    """A module by its dotted name; None if it does not exist or has no Python source."""
    spec = find_spec(name)
    if spec is None or not spec.has_location or not spec.origin.endswith(".py"):
        return None
    try:
        return SourceModule(name, Path(spec.origin))
    except (SyntaxError, ValueError):
        return None  # reported when it is imported


def find_spec(name: str) -> ModuleSpec | None:
    """Where a module is, without importing the packages that it is in. The current folder is searched as well.

    Raises ModuleNotFoundError if the module, or a package that it is in, does not exist.
    """
    path, *rest = name.split(".")
    here = PathFinder.find_spec(path, [os.getcwd()])
    spec = here or next(filter(None, (finder.find_spec(path, None) for finder in sys.meta_path)), None)
    for part in rest:
        if spec is None:
            break
        if spec.submodule_search_locations is None:
            return None  # defined by the code of its parent, such as os.path
        path = f"{path}.{part}"
        spec = PathFinder.find_spec(path, list(spec.submodule_search_locations))

    if spec is None:
        raise ModuleNotFoundError(f"No module named {path!r}", name=path)
    return spec


def names(module_name: str) -> list[str]:
    """The names that a module defines or imports, if it has Python source."""
    owner = module(module_name)
    return list(owner.names) if owner else []


def member(module_name: str, name: str, depth: int = 0) -> Any:
    """What `from module_name import name` stands for; `Any` if the source does not define it."""
    try:
        owner = module(module_name)
        if owner is not None and name in owner.names:
            return owner.lookup(name, depth)
        return module(f"{module_name}.{name}") or Any
    except ModuleNotFoundError:
        return Any


def find(dotted: str) -> Any:
    """The class of a dotted path, `Any` if the source does not define it.

    Raises ImportError, AttributeError or ValueError, with the messages of an import, if it does not exist.
    """
    module_name, _, name = dotted.rpartition(".")
    if not module_name:
        raise ValueError("Empty module name")
    owner = module(module_name)
    if owner is None:
        return Any
    if name not in owner.names and not owner.is_open:
        raise AttributeError(f"module {module_name!r} has no attribute {name!r}")
    kind = owner.lookup(name)
    return kind if is_source_class(kind) else Any
