"""How files that cannot be used are told of."""

from __future__ import annotations

from qat.data.problems import Problem, counted, counts, refusal, shown


def broken(*names: str) -> list[Problem]:
    return [Problem(name, "broken", "why") for name in names]


def test_a_line_counts_every_file_and_names_the_first_of_each_kind() -> None:
    found = broken(*(f"/set/{i}.png" for i in range(7)))
    found.append(Problem("/set/l.png", "dangling link", "gone"))
    assert counted(found, "/set") == (
        "1 dangling link (l.png), 7 broken (0.png, 1.png, 2.png, 3.png, 4.png and 2 more)"
    )
    assert counts(found) == {"dangling link": 1, "broken": 7}


def test_a_single_file_is_told_with_the_reason() -> None:
    assert "/set: 1 file cannot be used: 1 broken (a.png): why; repair" in str(
        refusal(broken("/set/a.png"), "/set")
    )


def test_names_never_reach_a_terminal_as_they_are() -> None:
    assert shown("caf\u00e9.png") == "caf\u00e9.png"
    assert shown("\x1b[31mred\n.png") == r"\x1b[31mred\n.png"
    assert shown("\udcff.png") == r"\udcff.png"
