"""The claims of the source documents: their list, the verdicts of the stored numbers, and a run of one claim alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tinyft import array

HERE = Path(__file__).parent / "benchmarks"
RESULTS = HERE / "results"
pytestmark = pytest.mark.skipif(array.backend() != "numpy", reason="the claims are measured on NumPy")
FACTS = dict.fromkeys(("date", "commit", "cpu", "system", "python"), "x")
MACHINE = {"versions": {"numpy": "2"}, "cores": 2, **FACTS}


@pytest.fixture(scope="module")
def claims():
    """The modules of tests/benchmarks/claims, importable for the length of this file's tests."""
    sys.path.insert(0, str(HERE))
    from claims import __main__ as program
    from claims import c07, c22, claim, page

    yield SimpleNamespace(program=program, c07=c07, c22=c22, claim=claim, page=page)
    sys.path.remove(str(HERE))
    for name in ("machine", "report", *[name for name in sys.modules if name.split(".")[0] == "claims"]):
        sys.modules.pop(name, None)


@pytest.fixture
def fake(claims):
    """A claim that measures nothing."""
    def judge(numbers: dict):
        verdict = "holds" if numbers["x"] == 3 else "wrong as stated"
        return claims.claim.Finding(verdict, "x", ("| x |",))

    return claims.claim.Claim(
        id="C07", claim="x is 3", source="001", refuted_by="an x other than 3", setup="one x",
        measure=lambda: {"x": 3}, judge=judge,
    )


def test_every_claim_has_its_file_and_says_what_would_refute_it(claims):
    found = claims.claim.all_claims()
    files = {path.stem.upper() for path in (HERE / "claims").glob("c[0-9][0-9].py")}
    assert files == set(found) and "C07" in found
    for name, claim in found.items():
        assert claim.id == name
        assert claim.source.split(", ")[0] in {"000", "001", "002", "003", "004"}
        assert min(len(claim.claim), len(claim.refuted_by), len(claim.setup)) > 20
        assert "|" not in claim.claim, "a cell of the table"


@pytest.mark.parametrize("path", sorted((RESULTS / "claims").glob("*.json")), ids=lambda path: path.stem)
def test_the_verdict_of_stored_numbers_is_computed_from_them(claims, path):
    stored = json.loads(path.read_text(encoding="utf-8"))
    claim = claims.claim.all_claims()[path.stem]
    again = claims.page.result_of(claim, stored["numbers"], stored["seconds"], stored["machine"])
    assert again == stored, "make claims ARGS=--page writes the verdicts again"
    assert claims.page.core_seconds(stored) <= claims.page.LIMIT
    assert stored["machine"]["commit"] and stored["machine"]["versions"]["numpy"]


def test_the_page_is_made_from_the_stored_results(claims):
    if not (RESULTS / "claims.md").exists():
        pytest.skip("no claim was measured yet")
    text = (RESULTS / "claims.md").read_text(encoding="utf-8")
    assert text == claims.page.page(claims.page.read_results(RESULTS)), "make claims ARGS=--page writes the page again"


def test_a_claim_run_alone_updates_its_own_row_only(claims, fake, tmp_path, monkeypatch):
    other = claims.page.result_of(fake, {"x": 4}, 1.0, MACHINE) | {"id": "C08", "claim": "x is four"}
    claims.page.write_result(other, tmp_path)
    monkeypatch.setattr(claims.program, "machine", lambda: MACHINE)
    claims.program.run(fake, tmp_path)
    first, second = claims.page.read_results(tmp_path)
    assert first["verdict"] == "holds" and first["numbers"] == {"x": 3}
    assert second == other
    text = (tmp_path / "claims.md").read_text(encoding="utf-8")
    assert '| C07 | x is 3 | 001 | x | `make claims ARGS="--only C07"` | **holds** |' in text
    assert "| C08 | x is four" in text and "an x other than 3" in text and "commit x" in text


def test_the_page_is_written_again_from_stored_numbers(claims, fake, tmp_path):
    claims.page.write_result(claims.page.result_of(fake, {"x": 4}, 1.0, MACHINE) | {"verdict": "holds"}, tmp_path)
    claims.program.judge_again(fake, tmp_path)
    assert claims.page.read_results(tmp_path)[0]["verdict"] == "wrong as stated"


def test_an_unknown_claim_and_an_unknown_verdict_are_refused(claims, capsys):
    with pytest.raises(SystemExit):
        claims.program.parse(["--only", "C99"])
    assert "--only wants some of" in capsys.readouterr().err
    with pytest.raises(ValueError, match="a verdict wants one of holds"):
        claims.claim.Finding("probably", "x")


def test_numbers_that_json_cannot_hold_are_refused(claims, fake, tmp_path):
    with pytest.raises(ValueError):
        claims.page.write_result(claims.page.result_of(fake, {"x": float("nan")}, 1.0, MACHINE), tmp_path)


# ---------------------------------------------------------------------------------------------------- C07
@pytest.mark.parametrize("ratios, verdict", [
    ((12.0, 20.0), "holds"),
    ((11.9, 12.1), "holds in part"),
    ((11.9, 20.1), "wrong as stated"),
])
def test_c07_counts_the_settings_within_the_claimed_range(claims, ratios, verdict):
    rows = []
    for B, ratio in zip((1, 2), ratios):
        spread = {"median": ratio, "low": ratio, "high": ratio}
        rows.append({"model": "m", "dtype": "float32", "batch": B, "weights": 10, "ratio": spread})
    finding = claims.c07.judge({"rows": rows})
    assert finding.verdict == verdict
    assert f"{ratios[1]:.1f}" in finding.measured


def test_c07_measures_weights_gradients_and_two_moments(claims):
    weights, peak = claims.c07.peak_of_fit("base-gpt-small", "float32", 1, 0)
    assert weights == 4 * 239_360
    assert peak > 4 * weights


# ---------------------------------------------------------------------------------------------------- C22
def growth(claims, obq: float, gptq: float) -> dict:
    """Times by exact powers of the width; a map of width 768 takes obq and gptq seconds."""
    factors = {"RTN": 1e-9, "GPTQ": gptq / 768**3, "OBQ": obq / 768**4}
    rows = []
    for rule, widths in claims.c22.WIDTHS.items():
        for width in widths:
            seconds = factors[rule] * width ** claims.c22.EXPECTED[rule]
            rows.append({"rule": rule, "width": width, "seconds": {"median": seconds, "low": seconds, "high": seconds}})
    return {"rows": rows}


@pytest.mark.parametrize("obq, gptq, verdict", [
    (85.0, 0.2, "holds"),                                            # 170 maps in 4 hours
    (850.0, 0.2, "holds in part"),
    (85.0, 9.0, "wrong as stated"),
])
def test_c22_extrapolates_with_the_power_that_it_sees(claims, obq, gptq, verdict):
    numbers = growth(claims, obq, gptq)
    for rule, power in claims.c22.EXPECTED.items():
        assert claims.c22.law(numbers, rule)[1] == pytest.approx(power)
    assert claims.c22.seconds_of_model(numbers, "OBQ", 1000) == pytest.approx(obq * (1000 / 768) ** 4 * 100)
    finding = claims.c22.judge(numbers)
    assert finding.verdict == verdict
    assert f"{obq * 1e8 / 768**2 / 3600:.1f} hours" in finding.measured


@pytest.mark.parametrize("rule", ["RTN", "GPTQ", "OBQ"])
def test_c22_measures_every_rule(claims, rule):
    assert claims.c22.seconds_of(rule, 20, 0) >= 0
