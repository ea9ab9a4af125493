"""A fast slice of benchmarks/faults/specs.py: mutated specs, every key misspelt, what is no spec's file."""

import os

import pytest

from benchmarks.faults.mutations import TEXT_MUTATIONS, VALUE_MUTATIONS, key_places, maximal_specs, mutant, valid_specs
from benchmarks.faults.specs import Findings, Hung, alarm, misspelt_keys, mutants, special_files
from scaling.errors import UserError
from scaling.spec import load_spec, spec_schema
from scaling.spec.schema import kinds


def test_mutated_specs_are_accepted_or_refused_in_the_house_form():
    findings = Findings()
    mutants(findings, 7, range(20 * (len(VALUE_MUTATIONS) + len(TEXT_MUTATIONS) + 1)))
    assert findings.failures == []
    assert findings.outcomes.keys() == {*VALUE_MUTATIONS, *TEXT_MUTATIONS, "--set"}
    refused = sum(outcomes["refused"] for outcomes in findings.outcomes.values())
    assert refused > 300 and findings.long_lines < 0.02 * findings.lines


@pytest.mark.fault("S2")
def test_every_key_misspelt_is_refused_with_the_right_one():
    findings = Findings()
    misspelt_keys(findings)
    assert findings.failures == []
    assert findings.outcomes["key misspelt, every one"]["refused"] > 4000


def test_maximal_specs_have_every_key_of_every_kind():
    spelt = {key for spec in maximal_specs() for _, key in key_places(spec)}
    schema = spec_schema()
    sections = [schema, *schema["$defs"].values()]
    assert spelt == {key for section in sections for key in section["properties"]}
    for name in ("objective", "data", "schedule", "backend"):
        assert {spec[name]["kind"] for spec in maximal_specs()} == set(kinds(schema["properties"][name]))


def test_a_mutant_is_a_function_of_seed_and_index():
    specs = valid_specs()
    assert [mutant(7, i, specs) for i in range(40)] == [mutant(7, i, specs) for i in range(40)]
    assert [mutant(7, i, specs) for i in range(40)] != [mutant(8, i, specs) for i in range(40)]


@pytest.mark.fault("S3")
def test_what_is_no_file_neither_blocks_nor_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source, codes in special_files(tmp_path).items():
        with alarm(2):
            if 0 in codes:
                load_spec(source)
                continue
            with pytest.raises(UserError) as caught:
                load_spec(source)
        assert len(str(caught.value).splitlines()) == 1


def test_the_check_sees_what_it_is_for(tmp_path):
    findings = Findings()
    findings.message("control", "", "spec.json: something is wrong")
    findings.message("control", "", "`a` must be 1, but is 2; do CANARY-in-a-url")
    findings.message("control", "", "`a` must be 1, but is 2; " + "x" * 500)
    findings.message("control", "", "")
    assert len(findings.failures) == 4
    findings.message("control", "", "`a` must be 1, but is 2; write 1")
    assert len(findings.failures) == 4
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Hung), alarm(0.05), open(tmp_path / "pipe"):
        pass
