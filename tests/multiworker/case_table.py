"""The table of all cases in docs/multiworker.md.

python tests/multiworker/case_table.py    # writes it
"""

import importlib
from pathlib import Path

from case_registry import CASES, EQUAL, Case

DOCUMENT = Path(__file__).parents[2] / "docs" / "multiworker.md"
BEGIN, END = "<!-- cases: python tests/multiworker/case_table.py -->\n", "<!-- end of cases -->\n"


def load_cases() -> None:
    """Imports all modules of cases, which registers them."""
    for module in sorted(Path(__file__).parent.glob("cases_*.py")):
        importlib.import_module(module.stem)


def rendered() -> str:
    """The table in Markdown; one part for each module of cases."""
    lines: list[str] = []
    title = ""
    for case in sorted(CASES.values(), key=lambda case: case.function.__module__):
        if title != (title := _title(case)):
            lines += ["", f"{title}:", "", "| case | processes | result |", "|---|---|---|"]
        lines.append(f"| {case.what} | {', '.join(map(str, case.workers))} | {_result(case)} |")
    return "\n".join(lines).lstrip() + "\n\n"


def _title(case: Case) -> str:
    return (importlib.import_module(case.function.__module__).__doc__ or "").strip()


def _result(case: Case) -> str:
    if case.parts:
        return "an error on every worker that waits, within 30 s"
    return "equal" if case.expected == EQUAL else "refused"


def written(document: str) -> str:
    """The document with the table of now."""
    before, rest = document.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}{rendered()}{END}{after}"


if __name__ == "__main__":
    load_cases()
    DOCUMENT.write_text(written(DOCUMENT.read_text()))
