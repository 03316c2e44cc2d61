"""Promises about the code itself: how long it is, what imports what, what importing it does."""

import ast
import io
import re
import statistics
import subprocess
import sys
import tokenize
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {file.stem: file for file in sorted(ROOT.glob("*.py"))}
# Imports only go down; what stands in LAZY is imported where a flag asks for it.
ALLOWED = {
    "model": set(),
    "tokenizer": set(),
    "vision": {"model"},
    "images": {"vision"},
    "cli": {"vision"},
    "checkpoint": {"model"},
    "cpu": {"model"},
    "gpu": {"model"},
    "quantize": {"checkpoint", "cli", "cpu", "gpu", "model"},
    "tp": {"checkpoint", "model", "quantize"},
    "generate": {"checkpoint", "cli", "cpu", "gpu", "images", "model", "quantize", "tokenizer", "tp", "vision"},
    "chat": {"cli", "generate", "images", "tokenizer", "tp"},
    "evaluate": {"cli", "generate", "gpu", "images", "model", "tokenizer", "tp", "vision"},
}
LAZY = {"generate": {"chat"}}
RUNTIME = {"torch", "PIL", "sentencepiece"}


def code_lines(source: str) -> int:
    """Lines with code on them: no blank ones, no comments, no docstrings."""
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                lines.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def imports(nodes) -> set[str]:
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    return names


def run(code: str, cwd: Path) -> subprocess.CompletedProcess:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    return subprocess.run([sys.executable, "-B", "-c", code], cwd=cwd, capture_output=True, text=True)


def loaded_by(statement: str, cwd: Path) -> set[str]:
    result = run(f"{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})", cwd)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_code_lines_are_counted():
    source = '"""Two\nlines."""\n\nx = 1  # one\n# none\ny = (\n    2,\n)\n\n\n'
    source += 'def f():\n    """None."""\n    return """a\nb"""\n'
    assert code_lines(source) == 1 + 3 + 1 + 2


def test_less_than_1000_lines():
    """The README's promise: model.py + vision.py + generate.py."""
    counts = {name: code_lines(MODULES[name].read_text()) for name in ("model", "vision", "generate")}
    assert sum(counts.values()) < 1000, counts


def test_functions_are_short():
    """In lines, those of a docstring included: median 8, 90th percentile 20, the longest 50 at most."""
    lengths = {}
    for name, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                lengths[f"{name}.{node.name}:{node.lineno}"] = node.end_lineno - node.lineno + 1
    long = {name: n for name, n in lengths.items() if n > 20}
    assert statistics.median(lengths.values()) <= 8
    assert statistics.quantiles(lengths.values(), n=10)[-1] <= 20, long
    assert max(lengths.values()) <= 50, long


def test_top_level_has_no_other_file():
    assert set(MODULES) <= set(ALLOWED)


@pytest.mark.parametrize("name", MODULES)
def test_imports_only_go_down(name):
    tree = ast.parse(MODULES[name].read_text())
    assert imports(tree.body) & set(ALLOWED) <= ALLOWED[name]
    assert imports(ast.walk(tree)) & set(ALLOWED) <= ALLOWED[name] | LAZY.get(name, set())


@pytest.mark.parametrize("name", MODULES)
def test_nothing_else_is_needed_at_run_time(name):
    found = imports(ast.parse(MODULES[name].read_text()).body) - sys.stdlib_module_names - set(ALLOWED) - {"scripts"}
    assert found <= (RUNTIME - {"torch", "PIL"} if name == "tokenizer" else RUNTIME)


def test_jinja2_comes_with_pytorch():
    """tokenizer.py imports it for chat templates: nothing has to be installed beside what RUNTIME holds."""
    tree = ast.parse(MODULES["tokenizer"].read_text())
    assert imports(ast.walk(tree)) - sys.stdlib_module_names == {"jinja2", "sentencepiece"}
    assert any(re.match(r"jinja2(?!.*extra ==)", line, re.IGNORECASE) for line in metadata.requires("torch"))


def test_tests_share_through_helpers_alone():
    for file in sorted((ROOT / "tests").rglob("*.py")):
        nodes = [
            node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        names = [getattr(node, "module", None) or alias.name for node in nodes for alias in node.names]
        assert all(name.startswith("tests.helpers") for name in names if name.partition(".")[0] == "tests"), file.name


def test_importing_generate_loads_neither_transformers_nor_extras(tmp_path):
    base = loaded_by("import torch, sentencepiece, PIL.Image, PIL.ImageOps", tmp_path)
    loaded = loaded_by("import generate", tmp_path)
    assert not loaded & {"transformers", "torchvision", "pyarrow", "huggingface_hub", "safetensors", "tokenizers"}
    assert "numpy" in base or "numpy" not in loaded
    outside = {name for name in loaded - base - set(ALLOWED) if not name.startswith("_")}
    assert outside <= sys.stdlib_module_names


def test_commands_import_cli_before_torch():
    """cli.py silences a warning of torch's import, so it has to come first; conversion and download too."""
    commands = [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py")]
    for file in commands:
        names = [name for node in ast.parse(file.read_text()).body for name in sorted(imports([node]))]
        if "torch" in names and "__main__" in file.read_text():
            outside = [name for name in names if name not in sys.stdlib_module_names]
            assert outside[0] == "cli", file.name


def test_torch_without_numpy_says_nothing(tmp_path):
    """Other warnings are still shown."""
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError(\"No module named 'numpy'\")\n")
    lines = "sys.path.insert(0, '.')\nimport cli, warnings\nwarnings.warn('another')"
    found = run(lines, tmp_path)
    assert found.returncode == 0 and "NumPy" not in found.stderr and found.stderr.count("Warning") == 1, found.stderr


def test_importing_has_no_side_effects(tmp_path):
    before = sorted(ROOT.glob("*"))
    result = run("import " + ", ".join(MODULES), tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
    assert sorted(ROOT.glob("*")) == before
