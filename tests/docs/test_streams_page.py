"""The tables of docs/how-to/long-streams.md are what benchmarks.streams wrote, and its advice agrees with them.

After another run of the benchmark, to write its numbers into the page: python tests/docs/test_streams_page.py
"""

import re

from helpers.page_text import TABLE, page, result, tables
from helpers.pages import DOCS

PAGE = DOCS / "how-to" / "long-streams.md"
WRITTEN = result("streams.md")
COSTS, *STREAMS = tables(WRITTEN)
NAMES = re.findall(r"^### (.*)$", WRITTEN, re.MULTILINE)
HEAD = STREAMS[0][0]
EARLY, LATE = (HEAD.index(f"gradient error, K = {tasks}") for tasks in (50, 199))
VALUE, MULTIPLE = (HEAD.index(f"{what}, K = 199") for what in ("value / exact", "best multiple"))
FORMS = ("merge to 1", "merge to 4", "merge to 10", "merge to 30", "10 + diagonal", "30 + diagonal", "diagonal")


def numbers(column: int) -> dict[str, list[str]]:
    """By form, the median of each stream."""
    return {
        rows[0][0]: [row[column].split()[0] for row in rows] for rows in zip(*(t[2:] for t in STREAMS), strict=True)
    }


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def expected() -> list[str]:
    """The tables of the page, in order."""
    head = ["form", "bytes per parameter after 200 tasks", "value and gradient after 10 tasks", "after 50", "after 200"]
    written = {(row[0], row[1]): [cell.split()[0] for cell in row[2:]] for row in COSTS[2:]}
    costs = []
    for form in ("exact", "merge to 10", "10 + diagonal", "diagonal"):
        bytes_, last, step, append = written["200", form]
        costs.append([form, bytes_, written["10", form][1], written["50", form][1], last, step, append])
    early, late, value = map(numbers, (EARLY, LATE, VALUE))
    errors = [[form, *map(", ".join, zip(early[form], late[form], strict=True))] for form in FORMS]
    return [
        table([*head, "`FusedAdamW`'s step after 200", "append to 200"], costs),
        table(["form", *NAMES], errors),
        table(["form", *NAMES], [[form, *value[form]] for form in FORMS[2:]]),
    ]


def test_the_tables_are_what_the_benchmark_wrote():
    assert re.findall(TABLE, page("docs/how-to/long-streams.md"), re.MULTILINE) == expected()


def test_the_advice_is_what_the_numbers_say():
    early, late = ({form: [*map(float, row)] for form, row in numbers(column).items()} for column in (EARLY, LATE))
    held = [i for i, name in enumerate(NAMES) if "without" not in name]
    permuted = [i for i in held if NAMES[i].startswith("Permuted")]
    assert (len(held), len(permuted)) == (3, 2)
    for i in held:
        assert early["merge to 30"][i] < 0.3 < 0.4 < early["merge to 10"][i] < 0.75
        assert 0.45 < late["merge to 30"][i] < 0.6
        assert early["merge to 1"][i] > 0.94
    assert early["merge to 4"][NAMES.index("Permuted pixels, without a penalty")] < 0.3
    assert min(early["diagonal"] + late["diagonal"]) > 0.95
    values = {form: [*map(float, row)] for form, row in numbers(VALUE).items()}
    multiples = {
        form: [float(x.replace("−", "-")) for x in row] for form, row in numbers(MULTIPLE).items() if "+" in form
    }
    for terms in (1, 4, 10, 30):
        merged, tail = f"merge to {terms}", f"{terms} + diagonal"
        assert all(late[tail][i] > late[merged][i] and values[tail][i] > 2 for i in permuted)
        assert all(abs(multiples[tail][i]) < 0.2 for i in permuted)
        for errors in (early, late):
            assert all(b > 0.95 * a for a, b in zip(errors[merged], errors[tail], strict=True))
        for i in {*range(len(NAMES))} - {*permuted} if terms > 1 else ():
            assert abs(values[tail][i] - 1) < abs(values[merged][i] - 1)


if __name__ == "__main__":
    written = iter(expected())
    PAGE.write_text(re.sub(TABLE, lambda _: next(written), PAGE.read_text(), flags=re.MULTILINE))
