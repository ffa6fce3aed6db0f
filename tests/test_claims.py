"""The claims ledger: every row is complete, and points at a place that exists and says the same."""

import csv

import nbformat
import pytest

VERDICTS = {"holds", "holds if", "imprecise", "wrong", "not checkable"}
# Claims of the sources, by the part that must meet them; a part joins when it is written.
EXPECTED = {
    "concepts": "C001 C002 C004 C005 C007 C008 C010 C011 C016 C019 C020 "
    "C026 C038 C055 C178 C179 C183 C184 C188 C228 C232",
    "math": "C003 C006 C009 C012 C013 C014 C015 C017 C018 C027 C028 C053 C059 "
    "C063 C064 C065 C067 C068 C069 C071 C072 C073 C076 C081 C082 C101 "
    "C155 C166 C167 C180 C181 C182 C189 C194 C195 C203 C204 C205 C219 "
    "C225 C226 C230",
    "balancing": "C023 C030 C031 C032 C033 C035 C036 C037 C050 C187 C197 "
    "C198 C207 C209 C210 C211 C212 C213 C214 C215 C216 C217 C218",
    "bandwidth": "C021 C024 C025 C029 C039 C040 C041 C042 C043 C044 C045 C049 "
    "C052 C054 C060 C061 C070 C074 C075 C084 C085 C086 C087 C088 C089 C090 "
    "C091 C092 C093 C094 C095 C096 C097 C098 C099 C100 C102 C103 C104 C105 "
    "C106 C114 C119 C120 C121 C162 C163 C168 C169 C185 C199 C200 C202 C206 "
    "C208 C229",
    "kernels": "C022 C034 C227",
    "finetuning": "C077 C110 C111 C112 C113 C126 C127 C128 C129 C130 C131 C132 C133 "
    "C134 C135 C136 C137 C138 C139 C161 C174 C175 C176 C177 C186 C191 C192 "
    "C193 C224",
    "choosing": "C046 C047 C048 C051 C056 C057 C058 C062 C066 C078 C079 C080 C083 C107 C108 "
    "C109 C115 C116 C117 C118 C122 C123 C124 C125 C140 C141 C142 C143 C144 C145 "
    "C146 C147 C148 C149 C150 C151 C152 C153 C154 C156 C157 C158 C159 C160 C164 "
    "C165 C170 C171 C172 C173 C190 C196 C201 C220 C221 C222 C223 C231",
}


@pytest.fixture(scope="module")
def claims(root):
    with (root / "moe_course" / "data" / "claims.csv").open(
        encoding="utf-8", newline=""
    ) as file:
        return list(csv.DictReader(file))


def test_every_expected_claim_is_met_once(claims):
    ids = [claim["id"] for claim in claims]
    assert len(ids) == len(set(ids))
    for part, expected in EXPECTED.items():
        assert {c["id"] for c in claims if c["part"] == part} == set(
            expected.split()
        ), part


def test_rows_are_complete(claims):
    for claim in claims:
        assert all(claim.values()), claim
        assert claim["verdict"] in VERDICTS, claim


def page_text(root, page):
    notebook = nbformat.read(root / "book" / f"{page}.ipynb", as_version=4)
    return "\n".join(
        cell.source for cell in notebook.cells if cell.cell_type == "markdown"
    )


def test_anchor_exists_and_its_verdict_stands_beside_it(root, claims):
    for claim in claims:
        text = page_text(root, claim["page"])
        anchor = f'<span id="{claim["anchor"]}"></span>'
        assert text.count(anchor) == 1, claim["id"]
        after = text.split(anchor)[1]
        # up to the next heading: a verdict may close the passage that the anchor opens
        passage = after.split("\n## ")[0]
        assert f'verdict-{claim["verdict"].replace(" ", "-")}"' in passage, claim["id"]


def test_no_anchor_without_a_row(root, claims):
    known = {(claim["page"], claim["anchor"]) for claim in claims}
    for path in sorted((root / "book").rglob("*.ipynb")):
        page = path.relative_to(root / "book").with_suffix("").as_posix()
        for part in page_text(root, page).split('<span id="claim-')[1:]:
            assert (page, "claim-" + part.split('"')[0]) in known


def test_the_readme_quotes_the_counts(root, claims):
    verdicts = [claim["verdict"] for claim in claims]
    some = verdicts.count("holds if") + verdicts.count("imprecise")
    text = (root / "README.md").read_text(encoding="utf-8")
    assert f"{len(claims)} claims from three such texts" in text
    assert f"{verdicts.count('wrong')} are wrong and {some} need a condition" in text
