"""What a fit is expected to take, against fits, and against what was measured on other machines."""

import json
from pathlib import Path

import pytest

from nectar_mlx import NectarError, plan
from nectar_mlx.benchmarks import planning
from nectar_mlx.fitting import budget, machines, pipeline
from nectar_mlx.fitting.config import FitConfig
from nectar_mlx.fitting.estimate import estimate
from tests import toys
from tests.fitting.toy_fit import FAST, TEXT, Recorded, shallow

H200 = next(machine for machine in machines.MACHINES if machine.name.startswith("H200"))


@pytest.mark.parametrize("options, positions", [
    ({"budget": 0.5, "context_tokens": 150}, 4096),
    ({"context_tokens": 150}, 4096),
    ({"kind": "exact", "context_tokens": 150}, 4096),
    ({"budget": 0.5, "layerwise": True, "context_tokens": 300}, 4096),
    ({"budget": 0.5}, 1500),
    ({"budget": 0.5, "distillation_steps": 2, "context_tokens": 150}, 4096),
    ({"size": 300_000, "distillation_steps": 2}, 1500),
    ({"kind": "exact", "memory": 1000, "context_tokens": 150}, 4096),
])  # fmt: skip
def test_the_stages_that_come_are_those_that_were_expected(tokenizer, monkeypatch, options, positions):
    """In their order; of the budgets that are tried there may be more or fewer."""
    monkeypatch.setattr(budget, "SMALL", 1.0)
    progress = Recorded()
    model = shallow("llama", max_position_embeddings=positions)
    toys.fit(model, tokenizer, TEXT, config=FitConfig(**FAST | options), progress=progress)
    of_budgets = ("choosing a budget", "checking a budget")
    came, expected = (
        [name for name in names if name not in of_budgets] for names in (progress.came, progress.expected)
    )
    assert came == expected
    assert (of_budgets[0] in progress.came) == (of_budgets[0] in progress.expected)


def test_a_long_fit_is_announced_with_time_memory_and_size(tokenizer, monkeypatch):
    said = []
    monkeypatch.setattr(pipeline, "LONG", 0.0)
    config = FitConfig(**FAST | {"kind": "exact", "context_tokens": 100})
    toys.fit(shallow(), tokenizer, TEXT, config=config, log=said.append)
    (line,) = said
    assert all(word in line for word in ("this takes about", "of memory", "of disk", "for a file of about"))


def test_a_short_fit_is_not(tokenizer):
    config = FitConfig(**FAST | {"kind": "exact", "context_tokens": 100})
    toys.fit(shallow(), tokenizer, TEXT, config=config, log=pytest.fail)


def test_the_machine_is_measured_once(monkeypatch):
    """A library of many documents fits each of them in one process."""
    first = machines.here()
    monkeypatch.setattr(machines, "time", None)
    assert machines.here().rate == first.rate


@pytest.mark.parametrize("name, parameters", [
    ("SmolLM2-135M", 135e6), ("Qwen3-1.7B", 1.7e9), ("Qwen3-8B", 7.6e9), ("Llama-3.3-70B", 70e9),
])  # fmt: skip
def test_published_shapes_have_their_parameters(name, parameters):
    """With one matrix of the vocabulary, as `Shape` counts them."""
    shape = machines.named_shape(f"someone/{name}-Instruct")
    assert shape.body + shape.vocabulary == pytest.approx(parameters, rel=0.05)


def test_a_loaded_model_has_the_shape_of_its_configuration(tmp_path, tokenizer):
    from nectar_mlx.mlxlm import attention_patch

    model = shallow()
    folder = toys.save_model(model, tmp_path / "model", tokenizer)
    loaded = machines.shape_of(model, attention_patch.route(model), "toy")
    named = machines.named_shape(str(folder))
    assert named.body == pytest.approx(loaded.body, rel=0.05) and named.vocabulary == loaded.vocabulary
    assert named.geometry.cache_bytes(100) == loaded.geometry.cache_bytes(100) and named.window == loaded.window == 4096


# Of docs/results.md, *Time of a fit*: Qwen3-1.7B's shape on one H200, 62,000 samples a head, without the check.
@pytest.mark.parametrize("tokens, seconds", [(8192, 21.0), (32768, 48.0)])
def test_what_was_measured_is_estimated_within_half(tokens, seconds):
    shape = machines._shape("Qwen3-1.7B", 28, *machines._PUBLISHED["Qwen3-1.7B"][1:-1], 1 << 20)
    with machines.using(H200.profile):
        config = FitConfig(budget=0.02, queries=62_000)
    assert estimate(shape, H200, config, tokens).seconds == pytest.approx(seconds, rel=0.5)


@pytest.fixture
def said_before(tokenizer, monkeypatch):
    """What a toy's fit says before anything takes long."""

    def fit(architecture, options):
        said = []

        def ended(*arguments, **named):
            raise KeyboardInterrupt

        monkeypatch.setattr(pipeline, "_check_room", ended)
        with pytest.raises(KeyboardInterrupt):
            toys.fit(toys.toy(architecture), tokenizer, TEXT, config=FitConfig(**FAST | options), log=said.append)
        return said

    return fit


@pytest.mark.parametrize("options, reason", [
    ({"budget": 0.009, "distillation_steps": 2}, None),
    ({"budget": 0.009, "distillation_steps": 0}, "on a CPU"),
    ({"budget": 0.009, "distillation_steps": 2, "layerwise": True}, "texts that are fitted layer by layer"),
    ({"budget": 0.009, "distillation_steps": 2, "bits": 8}, "heads of this kind"),
    ({"budget": 0.02, "distillation_steps": 0}, None),
    ({"budget": 0.009}, None),
])  # fmt: skip
def test_a_fit_says_that_a_small_file_is_not_distilled(said_before, options, reason):
    """Of an effort, or a budget, that never does it nothing is said."""
    said = said_before("llama", options)
    line = f"--effort best trains files below 1% through the whole model, but not {reason}"
    assert said == ([] if reason is None else [line])


def test_a_plan_says_that_small_files_are_not_distilled(capsys):
    def planned(*arguments):
        assert plan.main(["--model", "Qwen3-1.7B", "--effort", "best", *arguments]) == 0
        return [line for line in capsys.readouterr().err.splitlines() if "through the whole model" in line]

    small = ["--budget", "0.5%", "--tokens", "10k"]
    both = planned("--machine", "GB", *small, "1M")
    assert [line.partition("but not ")[2] for line in both] == ["on a CPU", "texts that are fitted in chunks"]
    assert planned("--machine", "H200", *small) == planned("--machine", "2 CPU", "--tokens", "10k") == []


@pytest.mark.parametrize("options, exceeded", [
    ({"budget": 0.05}, True),
    ({"size": 12_000}, True),
    ({"budget": 0.9}, False),
    ({"budget": "auto"}, False),  # it is chosen, and nothing is asked for
])  # fmt: skip
def test_a_fit_says_what_windows_take_beyond_the_budget(said_before, options, exceeded):
    said = said_before("gemma3_text", options)
    assert len(said) == exceeded and all("sliding windows, which are kept as they are, take 12.3 kB" in s for s in said)


@pytest.mark.parametrize("budget", [0.05, 0.3])
def test_the_size_of_a_file_with_windows_is_expected(tokenizer, budget):
    said, model = [], toys.toy("gemma3_text")
    options = FAST | {"budget": budget, "context_tokens": 300}
    nectar = toys.fit(model, tokenizer, TEXT, config=FitConfig(**options), log=said.append)
    told = float(said[0].partition("the file will have about ")[2].partition(" kB")[0])
    assert told == pytest.approx(nectar.nbytes / 1e3, rel=0.1) and nectar.nbytes > 1.1 * budget * nectar.cache_nbytes


def test_a_plan_says_what_windows_take_beyond_the_budget(tmp_path, tokenizer, capsys):
    from nectar_mlx.mlxlm import attention_patch

    model = toys.toy("gemma3_text")
    folder = str(toys.save_model(model, tmp_path / "model", tokenizer))
    assert machines.named_shape(folder).geometry.windows == attention_patch.route(model).windows

    def planned(*options):
        assert plan.main(["--model", folder, "--machine", "H200", "--tokens", "300", "--json", *options]) == 0
        (row,) = json.loads(capsys.readouterr().out)
        return row["file_bytes"], row["exceeded"]

    small, said = planned("--budget", "5%")
    assert "2.2 kB" in said and "take 6.1 kB: the file will have about 8.1 kB" in said
    assert small == int(6144 + 0.9 * 0.05 * 44_544 + 4 * 300), "windows, heads and the prefix"
    assert planned("--budget", "90%")[1] == planned()[1] == "", "auto is no budget"
    assert plan.main(["--model", folder, "--machine", "H200", "--tokens", "300", "--budget", "5%"]) == 0
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("fields, windows", [
    ({}, (0, 0, 0, 0)),
    ({"sliding_window": 64}, (0, 0, 0, 0)),  # mlx-lm heeds it with a pattern alone
    ({"sliding_window": 64, "sliding_window_pattern": 2}, (64, 0, 64, 0)),
    ({"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 2}, (64, 0, 64, 0)),
    ({"sliding_window": None, "layer_types": ["full_attention"] * 4}, (0, 0, 0, 0)),
])  # fmt: skip
def test_the_windows_of_a_configuration(tmp_path, fields, windows):
    config = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 320} | fields))
    assert machines.named_shape(str(tmp_path)).geometry.windows == windows


def test_a_size_is_that_of_all_chunks_together():
    shape = machines.named_shape("Qwen3-1.7B")
    share, size = (machines.settings(H200, budget=budget, kind="auto") for budget in ("1%", "1.147G"))
    one, other = (estimate(shape, H200, config, 1_000_000) for config in (share, size))
    assert one.chunks > 1 and other.size == pytest.approx(one.size, rel=0.01)
    assert other.seconds == pytest.approx(one.seconds, rel=0.01)


def test_exact_keys_are_read_at_once(capsys):
    """Where they are more than half of the memory, too: fits of this kind forget no keys."""
    options = ["--model", "Qwen3-8B", "--tokens", "300k", "--kind", "exact", "--machine", "H100", "--json"]
    assert plan.main(options) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["chunks"] == 1 and not row["layerwise"]


def test_what_cannot_be_joined_does_not_fit_in_chunks(capsys):
    options = ["--model", "Qwen3-8B", "--tokens", "30k", "100k", "--machine", "H200", "--json", "--kind"]
    for kind, expected in (("hybrid", [True, False]), ("auto", [True, True])):
        assert plan.main([*options, kind]) == 0
        assert [row["fits"] for row in json.loads(capsys.readouterr().out)] == expected


@pytest.mark.parametrize("window, tokens, reason", [
    (4096, "1000000T", "4096: at most 100,000"),
    (1080, "10", "its window of 1,080 tokens is too small"),
])  # fmt: skip
def test_a_text_that_no_window_holds_is_one_line(tmp_path, capsys, window, tokens, reason):
    config = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
    folder = tmp_path / str(window)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 320, "max_position_embeddings": window}))
    assert plan.main(["--model", str(folder), "--tokens", tokens, "--machine", "H100"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and reason in err


def test_more_takes_more():
    def seconds(name="Qwen3-8B", tokens=10_000):
        config = machines.settings(H200, budget="2%", kind="auto")
        return estimate(machines.named_shape(name), H200, config, tokens).seconds

    assert seconds() < seconds(tokens=20_000) < seconds(tokens=100_000) < seconds(tokens=1_000_000)
    assert seconds("Qwen3-1.7B") < seconds("Qwen3-8B") < seconds("Qwen3-32B") < seconds("Llama-3.3-70B")


def test_a_text_that_is_fitted_with_others_is_checked_again():
    shape, config = machines.named_shape("SmolLM2-135M"), machines.settings(H200, budget="0.02", kind="auto")
    alone, beside = (estimate(shape, H200, config, 6000, others=others).stages for others in (False, True))
    assert beside[:-1] == alone and beside[-1].description == alone[-1].description == "checking"
    assert beside[-1].seconds == pytest.approx(alone[-1].seconds * 2 / 3)


def test_others_in_view_are_planned(capsys):
    options = ["--model", "Qwen3-1.7B", "--tokens", "10k", "--machine", "H200", "--json"]
    stages = []
    for beside in ([], ["--with", "b.nectar", "--with", "c.nectar"]):
        assert plan.main([*options, *beside]) == 0
        (row,) = json.loads(capsys.readouterr().out)
        stages.append([stage["stage"] for stage in row["stages"]])
    assert stages[1] == [*stages[0], "checking"]
    said = []
    for tokens in ("10k", "1M"):
        assert plan.main(["--model", "Qwen3-1.7B", "--tokens", tokens, "--machine", "H200", "--with", "b.nectar"]) == 0
        said.append("leave out --with" in capsys.readouterr().err)
    assert said == [False, True]


def test_the_command_prints_every_combination(capsys):
    arguments = ["--model", "Qwen3-1.7B", "Llama-3.3-70B", "--tokens", "10k", "10M", "--machine", "M4"]
    assert plan.main([*arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {(row["model"], row["tokens"]) for row in rows} == {
        (model, tokens) for model in ("Qwen3-1.7B", "Llama-3.3-70B") for tokens in (10_000, 10_000_000)
    }
    assert len(rows) == 8 and all(row["seconds"] > 0 and row["file_bytes"] > 0 for row in rows)
    assert {row["fits"] for row in rows} == {True, False} and rows[0]["basis"] == "calculated"
    assert plan.main(arguments) == 0
    assert "Llama-3.3-70B" in capsys.readouterr().out


def test_a_plan_without_a_choice_is_of_this_machine_and_one_size(capsys):
    def planned(*arguments):
        assert plan.main(list(arguments)) == 0
        return capsys.readouterr()

    def chosen(*arguments):
        rows = json.loads(planned(*arguments, "--json").out)
        return [{row[name] for row in rows} for name in ("model", "tokens", "machine")]

    models, sizes, named = set(machines.SHAPES), set(machines.TOKENS), {m.name for m in machines.MACHINES}
    here = {"this machine"}
    assert chosen() == [models, {10_000}, here]
    assert chosen("--tokens", "50k") == [models, {50_000}, here]
    assert chosen("--machine", "H200") == [models, {10_000}, {"H200, 141 GB"}]
    assert chosen("--model", "Qwen3-8B") == [{"Qwen3-8B"}, sizes, named | here]
    assert chosen("--all") == [models, sizes, named | here]
    out, err = planned()
    assert len(out.splitlines()) == len(models) + 4 and "--all shows all" in err
    assert "--all" not in planned("--model", "Qwen3-8B", "--machine", "H200").err


@pytest.mark.parametrize("arguments, word", [
    (["--model", "nothing-9B"], "nothing-9B"),
    (["--machine", "abacus"], "abacus"),
    (["--machine", "Mac"], "Mac"),  # not "this machine"
    (["--tokens", "0"], "--tokens"),
    (["--tokens", "5x"], "number of tokens such as 50000 or 50k"),
    (["--budget", "7"], "budget"),
])  # fmt: skip
def test_a_mistake_is_one_line(capsys, arguments, word):
    assert plan.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and word in err and "Traceback" not in err


@pytest.mark.parametrize("fields", [
    {"hidden_size": "wide"},
    {"vocab_size": 1e308},
    {"intermediate_size": 10**400},
    {"num_hidden_layers": 2**62},
    {"num_key_value_heads": 5},
    {"max_position_embeddings": [1]},
    {"sliding_window": "x", "sliding_window_pattern": 2},
    {"layer_types": ["full_attention"]},
    {"layer_types": [1] * 4},
])  # fmt: skip
def test_a_configuration_that_is_none_is_one_line(tmp_path, fields):
    config = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
    for told in (fields, config | {"vocab_size": 320} | fields):
        (tmp_path / "config.json").write_text(json.dumps(told))
        with pytest.raises(NectarError, match="does not describe a model") as caught:
            machines.named_shape(str(tmp_path))
        assert "\n" not in str(caught.value)


def test_several_machines_take_less_and_never_less_than_their_share():
    shape, settings = machines.named_shape("Qwen3-1.7B"), machines.settings(H200, budget="2%", kind="auto")

    def seconds(tokens, count):
        return estimate(shape, H200, settings, tokens, machines=count).seconds

    for tokens in (10_000, 1_000_000):
        one, two, eight = (seconds(tokens, count) for count in (1, 2, 8))
        assert one / 2 <= two < one and one / 8 <= eight < two
    assert seconds(1_000_000, 8) < 0.2 * seconds(1_000_000, 1), "chunks are shared"


def test_the_page_is_what_the_command_prints():
    assert (Path(__file__).parents[2] / "docs" / "planning.md").read_text() == planning.page()


def test_the_number_of_machines_is_asked_for(capsys):
    named = ["--model", "Qwen3-1.7B", "--tokens", "100k", "--machine", "M4 Max", "--json"]
    assert plan.main([*named, "--machines", "4"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["machines"] == 4 and row["step_bytes"] < row["cache_bytes"]
    assert plan.main([*named, "--machines", "9"]) == 2


def test_an_effort_is_planned(capsys):
    seconds = []
    for effort in ("quick", "normal", "best"):
        options = ["--model", "Qwen3-8B", "--tokens", "100k", "--machine", "H200", "--effort", effort, "--json"]
        assert plan.main(options) == 0
        seconds.append(json.loads(capsys.readouterr().out)[0]["seconds"])
    assert seconds == sorted(seconds) and seconds[2] > 2 * seconds[1]
    assert plan.main(["--effort", "some"]) == 2
