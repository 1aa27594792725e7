"""Writes docs/reference: commands as the command line has them, names as the source has them. Runs nothing of either.

Tables of other pages that repeat what benchmarks/results holds are filled in too, between the marks that name them.
`python docs/make_reference.py` (`make reference`); tests/test_docs.py fails while the pages are not what this writes.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from typer.models import OptionInfo

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "reference"
ORDER = ("profile", "import", "inspect", "plan", "evaluate", "export", "bench", "report", "constrain", "codesign")
ORDER += ("finetune", "quality", "demo")
"""Commands in the order in which people need them."""
DEFAULTS = {("profile", "record"), ("export", "plan")}
"""Commands whose own name need not be given."""
LEFT_OUT = ("placement/cli/", "profiler/zoo/train.py", "profiler/zoo/corpora.py")
"""Modules that nobody imports: the command line, and what trained the embedded model."""
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises")


def pages() -> dict[str, str]:
    """The name and the text of every page."""
    return {
        "commands.md": commands(),
        **{f"{package}.md": names(package) for package in ("profiler", "placement")},
    }


def tables() -> dict[str, str]:
    """Pages with their tables as benchmarks/results has them."""
    out = {}
    for page in ("README.md", "docs/comparison.md", "docs/planning.md"):
        text = (ROOT / page).read_text()
        filled, count = re.subn(r"(<!-- peers: ([\w, ]+) -->\n).*?(<!-- end -->)", fill, text, flags=re.DOTALL)
        assert count == 1, page
        out[page] = filled
    return out


def fill(found: re.Match[str]) -> str:
    """The strategies named, on all traces."""
    strategies = found[2].split(", ")
    names = {"gpt-oss-20b": "gpt-oss-20b", "deepseek-v2-lite": "DeepSeek-V2-Lite"}
    lines = [f"| trace, ranks | {' | '.join(strategies)} |", f"| --- {'| --- ' * len(strategies)}|"]
    for (trace, ranks), of in peers().items():
        cells = ["{:.2f} / {:.3f} / {:.2f}".format(*of[strategy]) for strategy in strategies]
        lines.append(f"| {names[trace]}, {ranks} | {' | '.join(cells)} |")
    return found[1] + "\n".join(lines) + "\n" + found[3]


def peers() -> dict[tuple[str, int], dict[str, tuple[float, float, float]]]:
    """By trace and ranks: fan_out, busiest_ingress and imbalance_ratio of every strategy, held out."""
    stored = json.loads((ROOT / "benchmarks" / "results" / "planner_balance.json").read_text())
    assert stored["columns"][:6] == ["trace", "ranks", "strategy", "fan_out", "busiest_ingress", "imbalance_ratio"]
    out: dict[tuple[str, int], dict[str, tuple[float, float, float]]] = {}
    for trace, ranks, strategy, *figures in stored["rows"]:
        out.setdefault((trace, ranks), {})[strategy] = tuple(figures[:3])
    return out


def commands() -> str:
    """Every command with its arguments and options."""
    found = dict(every_command())
    parts = ["# Commands", "", "Written by `make reference` from what `--help` says.", ""]
    parts += ["| command | |", "| --- | --- |"]
    parts += [f"| [`{name}`](#{name.replace(' ', '-')}) | {paragraphs(does)[0]} |" for name, does in found.items()]
    for name, does in found.items():
        parts += ["", f"## {name}", "", "\n\n".join(paragraphs(does))]
        parts += ["", "| | | default | |", "| --- | --- | --- | --- |", *rows(does)]
    return "\n".join(parts) + "\n"


def every_command() -> Iterator[tuple[str, Callable[..., None]]]:
    """Name and function of every command."""
    from placement.cli import app

    groups = {group.name: group.typer_instance for group in app.registered_groups}
    alone = {command.callback.__name__: command.callback for command in app.registered_commands}
    assert sorted([*groups, *alone]) == sorted(ORDER), "a command is missing from ORDER, or has gone"
    for name in ORDER:
        if name in alone:
            yield f"coterie {name}", alone[name]
            continue
        for command in groups[name].registered_commands:
            sub = command.name or command.callback.__name__.replace("_", "-")
            yield f"coterie {name}" if (name, sub) in DEFAULTS else f"coterie {name} {sub}", command.callback


def paragraphs(does: Callable[..., None]) -> list[str]:
    """The help of a command, its example as code."""
    texts = [" ".join(paragraph.split()) for paragraph in (inspect.getdoc(does) or "").split("\n\n")]
    return [f"    {text.removeprefix('Example: ')}" if text.startswith("Example: ") else text for text in texts]


def rows(does: Callable[..., None]) -> list[str]:
    """Arguments and options: names, kind of value, default, meaning."""
    out = []
    for name, hint in get_type_hints(does, include_extras=True).items():
        if name == "return":
            continue
        default = inspect.signature(does).parameters[name].default
        kind, info = get_args(hint)
        if isinstance(info, OptionInfo):
            given = [info.default] if isinstance(info.default, str) else []  # typer's place for the first name
            written = [*given, *(info.param_decls or ())] or [f"--{name.replace('_', '-')}"]
            shown = ", ".join(f"`{each}`" for each in sorted(written, key=len))
        else:
            shown = f"`{(info.metavar or name.upper()).strip('[].')}`"
        kinds = kind_of(kind)
        empty = default is None or default is False
        value = (
            "needed"
            if default is inspect.Parameter.empty
            else ""
            if empty
            else f"`{getattr(default, 'value', default)}`"
        )
        cells = (shown, kinds, value, " ".join((info.help or "").split()))
        out.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return out


def kind_of(hint: Any) -> str:
    """What may be given, in words."""
    parts = [part for part in get_args(hint) if part is not type(None)]
    if get_origin(hint) is list:
        return f"{kind_of(parts[0])}; several"
    if parts:
        return kind_of(parts[0])
    if issubclass(hint, Enum):
        return ", ".join(f"`{choice.value}`" for choice in hint)
    return {bool: "", int: "whole number", float: "number", str: "text", Path: "path"}[hint]


def names(package: str) -> str:
    """Every public name of a package's modules: constants, functions, classes and their methods."""
    parts = [f"# Python: {package}", "", "Written by `make reference` from signatures and docstrings.", ""]
    for path in public_modules(package):
        tree = ast.parse(path.read_text())
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        parts += [f"## {module}", "", *explained(ast.get_docstring(tree) or ""), ""]
        for kind, signature, text in public_names(tree):
            parts += [f"{'####' if kind == 'method' else '###'} `{signature}`", "", *explained(text), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


def public_modules(package: str) -> list[Path]:
    """Files that people import from."""
    found = sorted((ROOT / package).rglob("*.py"))
    return [path for path in found if not path.relative_to(ROOT).as_posix().startswith(LEFT_OUT)]


def public_names(tree: ast.Module) -> Iterator[tuple[str, str, str]]:
    """Kind, signature and docstring of what a module offers, in the order of its source."""
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield "function", signature(node), ast.get_docstring(node) or ""
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield "class", f"class {node.name}", ast.get_docstring(node) or ""
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                    yield "method", f"{node.name}.{signature(method)}", ast.get_docstring(method) or ""
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            if isinstance(target, ast.Name) and not target.id.startswith("_"):
                said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                if not said and not target.id.isupper():
                    continue  # short for a type
                value = ast.unparse(node.value) if node.value else ""
                short = f"{target.id} = {value}" if len(value) < 60 else target.id
                yield "constant", short, inspect.cleandoc(str(after.value.value)) if said else ""  # type: ignore[union-attr]


def signature(node: ast.FunctionDef) -> str:
    """A function as its definition has it; a property without parentheses."""
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    if decorators & {"property", "cached_property"}:
        return f"{node.name}{returns}"
    arguments = re.sub(r"^(self|cls)(, |$)", "", ast.unparse(node.args))
    return f"{node.name}({arguments}){returns}"


def explained(docstring: str) -> list[str]:
    """A docstring as Markdown: its sections become lists."""
    out: list[str] = []
    section = ""
    for line in docstring.splitlines():
        if line.rstrip(":") in SECTIONS and line.endswith(":"):
            section = line.rstrip(":")
        elif section and line.startswith("    ") and not line.startswith("     "):
            word, colon, rest = line.strip().partition(": ")
            entry = f"`{word}`: {rest}" if colon and " " not in word.replace(", ", "") else line.strip()
            out.append(f"- {section.lower()}: {entry}")
        elif section and line.strip():
            out[-1] += f" {line.strip()}"
        else:
            section = "" if line.strip() else section
            out += [line] if line.strip() or (out and not out[-1].startswith("- ")) else []
    return out


def main() -> None:
    """Write all pages."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text)
    for name, text in tables().items():
        (ROOT / name).write_text(text)


if __name__ == "__main__":
    main()
