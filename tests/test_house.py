"""Promise: the house keeps its rules: who may import whom, what lies at the top, nothing dense,
types on what crosses a file, one name for one thing.
"""

import ast
import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("train", "data_prep", "sample", "evaluate", "convert", "serve")
FOLDERS = ("common", "model_io", "training", "chimed", "evaluation", "serving", "demo")
FILES = sorted(
    [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))]
)
NAMES = [path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in FILES]
TREES = {
    name: ast.parse(path.read_text(encoding="utf-8"))
    for name, path in zip(NAMES, FILES, strict=True)
}
SHARED = {"qilin_min", "common", "model_io"}
MAY_IMPORT = {  # beside itself; of each folder, and of the model
    "qilin_min": set(),
    "common": {"qilin_min"},
    "model_io": {"qilin_min", "common"},
    "training": SHARED,
    "chimed": SHARED,
    "evaluation": SHARED,
    "serving": SHARED,
    "demo": SHARED,
}
EXCEPTIONS = {
    ("training.smoke", "demo.toy"),
    ("evaluation.testsets", "chimed.sources"),
}  # each with its reason there
WORKSHOP = {
    "train": "training",
    "data_prep": "chimed",
    "sample": None,
    "evaluate": "evaluation",
    "convert": None,
    "serve": "serving",
}
ENTRIES = (
    "main",
    "start",
    "run",
)  # of commands and sub-commands: the only ones that see the options as they were typed
MAX_LINES = 60

each_file = pytest.mark.parametrize("name", NAMES)


def ours(name):
    return name.split(".")[0] in {"qilin_min", *COMMANDS, *FOLDERS}


def imports(name):
    """Modules that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside & set(NAMES) or {node.module}
    return found


def functions(name):
    return [
        node
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def parameters(function):
    return [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]


def test_the_top_holds_the_model_and_six_commands():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(("qilin_min", *COMMANDS))


def test_the_model_needs_torch_safetensors_and_the_standard_library():
    assert {name.split(".")[0] for name in imports("qilin_min")} <= {
        "torch",
        "safetensors",
    } | sys.stdlib_module_names


@each_file
def test_who_imports_whom(name):
    home = name.split(".")[0]
    for other in imports(name):
        if not ours(other) or (name, other) in EXCEPTIONS:
            continue
        there = other.split(".")[0]
        allowed = MAY_IMPORT[home] | {home} if home in MAY_IMPORT else SHARED | {WORKSHOP[home]}
        assert there in allowed, f"{name} imports {other}"


def test_common_takes_one_word_from_the_model():
    taken = set()
    for name in NAMES:
        for node in ast.walk(TREES[name]) if name.startswith("common.") else []:
            if isinstance(node, ast.ImportFrom) and node.module == "qilin_min":
                taken |= {alias.name for alias in node.names}
    assert taken <= {"IMAGE_TOKEN"}


def test_no_import_goes_in_a_circle():
    done = set()

    def visit(name, way):
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for other in sorted(imports(name) & set(NAMES)):
                visit(other, [*way, name])
            done.add(name)

    for name in NAMES:
        visit(name, [])


def is_nested_conditional(node):
    if not isinstance(node, ast.IfExp):
        return False
    parts = [part for half in (node.test, node.body, node.orelse) for part in ast.walk(half)]
    return any(isinstance(part, ast.IfExp) for part in parts)


def is_text(node):
    """A text of more than one character: a rule of dashes is no condition."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and len(node.value) > 1
    return isinstance(node, ast.JoinedStr)


def is_text_times_something(node):
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Mult):
        return False
    pairs = ((node.left, node.right), (node.right, node.left))
    return any(is_text(a) and not isinstance(b, ast.Constant) for a, b in pairs)


def is_assignment_of_several(node):
    """a, b = x, y; but a swap may stand."""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
        return False
    target = node.targets[0]
    if not isinstance(target, ast.Tuple):
        return False
    return {*map(ast.unparse, target.elts)} != {*map(ast.unparse, node.value.elts)}


def is_nested_comprehension(node):
    if not isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        return False
    return len(node.generators) > 1 or len(node.generators[0].ifs) > 1


def is_loop_over_conditional(node):
    is_loop = isinstance(node, ast.For | ast.AsyncFor | ast.comprehension)
    return is_loop and isinstance(node.iter, ast.IfExp)


DENSE = {
    "a conditional expression inside another": is_nested_conditional,
    "a text times something": is_text_times_something,
    "a tuple that assigns several things": is_assignment_of_several,
    "a comprehension with more than one for or if": is_nested_comprehension,
    "a loop over a conditional expression": is_loop_over_conditional,
    "a module global that is assigned in a function": lambda node: isinstance(node, ast.Global),
}


def dense_places(tree):
    found = []
    for node in ast.walk(tree):
        line = getattr(node, "lineno", "?")
        found += [f"line {line}: {what}" for what, is_dense in DENSE.items() if is_dense(node)]
    return found


@each_file
def test_nothing_is_dense(name):
    assert not dense_places(TREES[name])


@pytest.mark.parametrize(
    "code",
    [
        "x = a if b else c if d else e",
        "x = 'and more' * bool(y)",
        "a, b = f(x), g(y)",
        "x = [i for row in rows for i in row]",
        "x = [i for i in row if a if b]",
        "for i in (a if b else ()): pass",
        "def f():\n    global x\n    x = 1",
    ],
)
def test_what_is_dense_is_seen(code):
    assert len(dense_places(ast.parse(code))) == 1


@pytest.mark.parametrize("code", ["a, b = b, a", "x = '-' * 9", "x = [i for i in row if i]"])
def test_what_is_not_dense_may_stand(code):
    assert not dense_places(ast.parse(code))


@each_file
def test_functions_are_read_on_one_screen(name):
    for function in functions(name):
        length = function.end_lineno - function.lineno + 1
        is_flat = not any(
            isinstance(node, ast.If | ast.For | ast.While | ast.Try) for node in ast.walk(function)
        )
        is_list = (
            is_flat
            and sum(isinstance(node, ast.Expr) for node in function.body) > len(function.body) / 2
        )
        assert length <= MAX_LINES or is_list, (
            f"{name}: line {function.lineno}: {function.name} has {length} lines"
        )


@each_file
def test_options_stop_at_the_command(name):
    for function in functions(name):
        for parameter in parameters(function):
            kind = ast.unparse(parameter.annotation) if parameter.annotation else ""
            takes_options = parameter.arg == "args" or "Namespace" in kind
            assert not takes_options or function.name in ENTRIES, (
                f"{name}: line {function.lineno}: {function.name} takes the command's options"
            )
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func).split(".")[-1] not in ("Namespace", "SimpleNamespace"), (
                f"{name}: line {node.lineno}: options are forged"
            )


@each_file
def test_what_crosses_a_file_has_types(name):
    public = [
        node
        for node in TREES[name].body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    for node in TREES[name].body:
        if isinstance(node, ast.ClassDef):
            public += [
                method
                for method in node.body
                if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef)
            ]
    for function in public:
        if function.name.startswith("_") and function.name != "__init__":
            continue
        untyped = [
            p.arg
            for p in parameters(function)
            if p.annotation is None and p.arg not in ("self", "cls", "ctx")
        ]
        assert not untyped, (
            f"{name}: line {function.lineno}: {function.name}: no type for {', '.join(untyped)}"
        )
        assert function.returns is not None or function.name == "__init__", (
            f"{name}: line {function.lineno}: {function.name}: no type of what it returns"
        )


def test_one_name_means_one_thing():
    homes = defaultdict(set)
    for name in NAMES:
        for node in TREES[name].body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                homes[node.name].add(name)
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    homes.update(
                        {
                            part.id: homes[part.id] | {name}
                            for part in ast.walk(target)
                            if isinstance(part, ast.Name)
                        }
                    )
    twice = {
        word: sorted(names)
        for word, names in homes.items()
        if len(names) > 1 and word not in (*ENTRIES, "add_command", "build_parser", "__all__")
    }
    assert not twice


@each_file
def test_pages_are_files_of_their_own(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not re.search(
                r"<!doctype|<html|<(script|style)\b[^>]*>\s*\S", node.value, re.IGNORECASE
            ), f"{name}: line {node.lineno}: a page inside Python"


def test_what_torch_keeps_private_is_used_in_one_place_each():
    places = defaultdict(list)
    for name, path in zip(NAMES, FILES, strict=True):
        for word in re.findall(
            r"torch\._(?!_)\w+|\b_nested_dict\b|(?<=\.)_apply\(", path.read_text(encoding="utf-8")
        ):
            places[word].append(name)
    assert all(len(names) == 1 for names in places.values()), dict(places)


def test_the_rules_see_what_they_forbid():
    """A check that finds nothing must be one that could."""
    assert ("train", "training.plan") in {
        (name, other) for name in NAMES for other in imports(name)
    }
    assert len(NAMES) > 40
