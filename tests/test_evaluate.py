"""The command end to end on a toy: the JSON object, the table, questions of one's own, and bad input."""

import itertools
import json
import math
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from nectar_mlx import NectarError, evaluate
from nectar_mlx.baselines import EvalConfig, EvalContext
from nectar_mlx.evaluation import answers, methods, questions, similarity, summary
from nectar_mlx.evaluation.run import Options, QuestionOptions
from nectar_mlx.evaluation.run import evaluate as run_evaluation
from nectar_mlx.fitting import prefill
from nectar_mlx.fitting.samples.conversation import Conversation
from nectar_mlx.mlxlm import attention_patch, prompts
from tests import toys

TEXT = "The brig left Ostend on 4 May 1847. Her master was Anna Velde, and she carried 299 casks of amber. " * 4
TOKENIZER = toys.tokenizer()
FOUR = QuestionOptions(count=4)
FAST = Options(questions=FOUR, answer_tokens=8, samples=300, baselines="none", answers=False)


@pytest.fixture(scope="module")
def model():
    return toys.toy("llama")


@pytest.fixture(scope="module")
def prefix():
    return prompts.prefix(TOKENIZER, TEXT)


@pytest.fixture(scope="module")
def result(model, prefix):
    files = {"large": toys.picked(model, prefix, 60, TOKENIZER), "small": toys.picked(model, prefix, 12, TOKENIZER)}
    return run_evaluation(
        model,
        TOKENIZER,
        files,
        options=Options(questions=FOUR, answer_tokens=8, samples=300, baselines="attention-matching,sinks-window"),
    )


@pytest.fixture(autouse=True, scope="module")
def own_states():
    """Nothing is fetched: answers are compared by the toy's own states."""

    def refuse(log):
        raise NectarError("no network in this test")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(similarity, "fetch_minilm", refuse)
        yield


def test_every_method_is_measured_on_every_kind(result):
    names = [(m["method"], m["file"]) for m in result["methods"]]
    assert names[:3] == [("nectar", "large"), ("nectar", "small"), ("no context", "large")]
    assert names.count(("Attention Matching", "small")) == 1 and len(names) == 7
    for m in result["methods"]:
        kinds = {"on-context", "off-context", "re-reading", "continuation", "later turn"}
        assert m["kinds"].keys() - {"own words"} == kinds
        assert m["kl"] == m["kinds"]["on-context"]["kl"]
        for figures in m["kinds"].values():
            low, high = figures["kl_interval"]
            assert 0 <= low <= figures["kl"] <= high and 0 <= figures["agree"] <= 1


def test_the_gap_is_that_to_no_context(result):
    floor = next(m for m in result["methods"] if m["method"] == "no context")
    assert floor["gap_closed"] == 0 and floor["bytes"] == 0
    for m in result["methods"]:
        assert m["gap_closed"] == pytest.approx(1 - m["kl"] / floor["kl"], abs=1e-3)


def test_baselines_get_at_most_the_bytes_of_the_file(result):
    allowed = {m["file"]: m["bytes"] for m in result["methods"] if m["method"] == "nectar"}
    assert all(m["bytes"] <= allowed[m["file"]] for m in result["methods"])


def test_the_result_is_json_and_repeatable(result, model, prefix):
    assert json.loads(json.dumps(result))["methods"] == result["methods"]
    files = {"it": toys.picked(model, prefix, 20, TOKENIZER)}
    first, second = (run_evaluation(model, TOKENIZER, files, options=FAST) for _ in range(2))
    assert first["methods"][0]["kl"] == second["methods"][0]["kl"]


def test_an_exact_file_closes_the_whole_gap(model, prefix):
    found = run_evaluation(model, TOKENIZER, {"exact": toys.exact(model, prefix, TOKENIZER)}, options=FAST)
    exact = found["methods"][0]
    assert exact["gap_closed"] > 0.999 and exact["agree"] == 1 and max(found["heads"]) < 1e-4


def test_correlations_are_over_the_methods_with_heads(result):
    names = {"error, accuracy gap", "error, KL", "KL, accuracy gap"}
    assert set(result["correlation"]) == names | {f"{name}, files alone" for name in names}
    assert result["correlation"]["error, KL, files alone"] is None, "two files have no rank correlation"
    fitted = [m for m in result["methods"] if m["error"] is not None]
    assert len(fitted) == 6, "no context reads another text: its heads have no error"
    assert result["correlation"]["error, KL"] > 0.5


def test_answers_are_compared_with_a_second_sample_of_the_full_cache(result):
    told = result["answers"]
    assert told["answers"] == 4 and "hidden states" in told["by"]
    assert told["files"].keys() == {"large", "small"}
    for name, of in [("again", told), ("nothing", told), *(("similarity", file) for file in told["files"].values())]:
        assert -1 <= of[f"{name}_interval"][0] <= of[name] <= of[f"{name}_interval"][1] <= 1.0001
    for file in told["files"].values():
        assert file["less"] == pytest.approx(file["similarity"] - told["again"], abs=2e-4)
    assert result["examples"][0].keys() == {"question", "full", "again", "nothing", "files"}
    assert result["examples"][0]["files"].keys() == {"large", "small"}


def test_similarity_is_to_both_answers_of_the_full_cache():
    vectors = {"a": [1.0, 0.0], "b": [0.0, 1.0], "c": [0.6, 0.8], "d": [-1.0, 0.0]}

    def embed(texts):
        return np.array([vectors[t] for t in texts])

    sampled = [
        answers.SampledAnswers(question="1", full="a", again="c", no_context="b", files={"x": "c", "y": "a"}),
        answers.SampledAnswers(question="2", full="a", again="a", no_context="d", files={"x": "a", "y": "d"}),
    ]
    told = answers.meaning(sampled, by="a table", embed=embed)
    assert told["again"] == pytest.approx((0.6 + 1) / 2) and told["nothing"] == pytest.approx((0.4 - 1) / 2)
    assert told["files"]["x"]["similarity"] == pytest.approx((0.8 + 1) / 2)
    assert told["files"]["y"]["less"] == pytest.approx((0.8 - 1) / 2 - 0.8)
    low, high = told["files"]["x"]["less_interval"]
    assert (low, high) == pytest.approx((0, 0.2)), "paired: the differences of the two questions"


def test_similarity_is_over_all_pairs_of_answers_to_a_question():
    rng, names = np.random.default_rng(0), ("full", "again", "nothing", "it")
    questions = ["1", "2", "1", "1"]  # three answers to one, one to the other
    vectors = {f"{name} {i}": rng.normal(size=6) for name in names for i in range(4)}
    vectors = {text: v / np.linalg.norm(v) for text, v in vectors.items()}
    sampled = [
        answers.SampledAnswers(
            question=q, full=f"full {i}", again=f"again {i}", no_context=f"nothing {i}", files={"f": f"it {i}"}
        )
        for i, q in enumerate(questions)
    ]
    told = answers.meaning(sampled, by="a table", embed=lambda texts: np.array([vectors[t] for t in texts]))
    again, ours = [], []
    for group in ([0, 2, 3], [1]):
        full = [vectors[f"{name} {i}"] for name in ("full", "again") for i in group]
        again.append(np.mean([a @ b for a, b in itertools.combinations(full, 2)]))
        ours.append(np.mean([a @ vectors[f"it {i}"] for a in full for i in group]))
    assert (told["answers"], told["questions"]) == (4, 2)
    assert told["again"] == pytest.approx(np.mean(again), abs=1e-4)
    assert told["files"]["f"]["similarity"] == pytest.approx(np.mean(ours), abs=1e-4)


def test_the_table_names_every_method(result):
    files = {f"/a/folder/{name}.nectar": told for name, told in result["files"].items()}
    methods = [{**m, "file": f"/a/folder/{m['file']}.nectar"} for m in result["methods"]]
    long = {**methods[-1], "method": "a method with quite a long name, of which nothing is cut off"}
    facts = [{"method": f"nectar @ {file}", "found": 0.5, "found_interval": [0.25, 0.75], "quarters": [None] * 4}
             for file in files]  # fmt: skip
    table = summary.table({**result, "files": files, "methods": [*methods, long], "facts": facts})
    for m in (*methods, long):
        name = f"{m['method']} {m['file'].removeprefix('/a/folder/')}" if m["bytes"] else m["method"]
        assert any(line.startswith(f"{name} ") and f"{m['bytes']:,}" in line for line in table.splitlines())
    assert "nectar small.nectar" in table.split("facts found")[1] and "(25%–75%)" in table and "folder" not in table
    assert max(map(len, summary.table(result).splitlines())) < 100


def test_a_sparsely_read_file_is_told_what_that_costs(model, prefix):
    nectar = toys.picked(model, prefix, 20, TOKENIZER)
    nectar.metadata["config"]["prefill"] = "fixed"
    told = run_evaluation(model, TOKENIZER, {"it": nectar}, options=FAST)["methods"]
    (sparse,) = [m for m in told if m["method"] == "sparse prefill"]
    assert sparse["bytes"] == nectar.cache_nbytes and 0 <= sparse["kl"] < told[1]["kl"]


def test_files_of_different_texts_are_refused(model, prefix):
    files = {"a": toys.picked(model, prefix, 9), "b": toys.picked(model, prefix[:-4], 9)}
    with pytest.raises(NectarError, match="different texts"):
        run_evaluation(model, TOKENIZER, files, options=FAST)


def make_context(model, prefix):
    geometry = attention_patch.route(model)
    return EvalContext(
        model=model,
        tokenizer=TOKENIZER,
        geometry=geometry,
        context=prefill.read_text(model, prefix, geometry),
        config=EvalConfig(answer_tokens=8),
    )


def test_questions_from_a_file(model, prefix, tmp_path):
    own = tmp_path / "questions.txt"
    own.write_text('Who was master?\n\n{"question": "Which year?", "answer": 1847, "depth": 0.1}\n')
    found = questions.from_file(own, make_context(model, prefix).ask)
    assert [(q.text, q.expected) for q in found] == [
        ("Who was master?", None),
        ("Which year?", questions.Expected(answer="1847", depth=0.1)),
    ]
    options = replace(FAST, questions=replace(FOUR, file=own))
    told = run_evaluation(model, TOKENIZER, {"it": toys.exact(model, prefix, TOKENIZER)}, options=options)
    full, file, nothing = told["facts"]
    assert file["quarters"] == [file["found"], None, None, None]
    assert (full["method"], nothing["method"]) == ("full cache", "no context")
    assert file["right"] == full["right"] == [[0.1, full["right"][0][1]]]


@pytest.mark.parametrize("together", [1, 2])
def test_the_likeliest_choice_is_the_answer(model, prefix, tmp_path, set_device, together):
    set_device(choices_batch=together)
    ctx = make_context(model, prefix)
    own = tmp_path / "questions.jsonl"
    choices = ["She carried 299 casks.", "She carried 300 casks.", "She carried 17 casks of tar and salt."]
    lines = [{"question": "What cargo?", "answer": answer, "choices": choices} for answer in ("299", "300", "17")]
    own.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = questions.numbered(questions.from_file(own, ctx.ask), samples=2)
    scores = []
    for choice in choices:
        ids = prompts.encode(TOKENIZER, choice, specials=False)
        tokens = mx.array([[*prefix, *asked[0].conversation.prompt, *ids]])
        rows = nn.log_softmax(model(tokens)[0, -1 - len(ids) : -1].astype(mx.float32), axis=-1)
        scores.append(sum(float(rows[i, token]) for i, token in enumerate(ids)))
    exact = toys.exact(model, prefix, TOKENIZER)
    view = answers.View(banks=exact.banks, start=len(prefix), nbytes=0)
    (told,) = answers.facts(ctx, asked, {"it": view}, seed=0)
    best = max(range(3), key=lambda i: scores[i])
    assert [hit for _, hit in told["right"]] == [i == best for i in range(3)]
    assert told["found"] == pytest.approx(1 / 3, abs=1e-4)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("", "no question"), ("\n \n", "no question"), ('{"question": ', "not JSON"), ('{"answer": "x"}', "missing"),
     ('{"question": ' + "[" * 100_000, "not JSON"), ('{"question": "Who?", "depth": ' + "9" * 5000 + "}", "not JSON"),
     ('{"question": "Who?", "answer": ["x"]}', "must be text"), ('{"question": "Who?", "depth": "deep"}', "number"),
     ('{"question": "Who?", "choices": "x"}', "list of texts"),
     ('{"question": "Who?", "answer": "x", "choices": ["a x", "x b"]}', "exactly one"),
     ('{"question": "Who?", "choices": ["x", "y"]}', "exactly one")],
)  # fmt: skip
def test_broken_question_files_are_refused(model, prefix, tmp_path, content, complaint):
    path = tmp_path / "broken.jsonl"
    path.write_text(content)
    with pytest.raises(NectarError, match=complaint):
        questions.from_file(path, make_context(model, prefix).ask)
    with pytest.raises(NectarError, match="cannot read"):
        questions.from_file(tmp_path / "none", make_context(model, prefix).ask)


def test_held_out_questions_are_not_the_ones_of_a_fit(model, prefix):
    from nectar_mlx.fitting.samples import instructions

    ctx = make_context(model, prefix)
    asked = questions.held_out(ctx, count=8, seed=1)
    kinds = [a.kind for a in asked]
    assert [kinds.count(k) for k in ("on-context", "off-context", "re-reading", "continuation")] == [8, 4, 2, 2]
    trained = {t.split("{")[0] for t in instructions.GENERIC + instructions.ABOUT + instructions.UNRELATED}
    assert not any(a.text.startswith(t) for a in asked for t in trained if t)
    again = next(a for a in asked if a.kind == "re-reading").conversation
    shown = again.prompt[-4:] + again.answer
    assert any(prefix[i : i + len(shown)] == shown for i in range(len(prefix)))


def test_several_answers_to_a_question_are_one_resample(model, prefix):
    ctx = make_context(model, prefix)
    asked = questions.numbered(questions.held_out(ctx, count=2, seed=1), samples=3)
    assert [a.number for a in asked if a.kind == "on-context"] == [0, 0, 0, 1, 1, 1]
    assert [a.kind for a in asked].count("re-reading") == 1, "its answer is the text's own"
    questions.sample_answers(ctx, asked, seed=0)
    answered = [tuple(a.conversation.answer) for a in asked if a.number == 0]
    assert all(answered) and len(set(answered)) > 1
    compared = methods.build(ctx, {"it": toys.picked(model, prefix, 9, TOKENIZER)}, [])
    compared = methods.measure(ctx, compared, asked)
    told = summary.summaries(compared, asked, {m.label: [] for m in compared}, questions.recited(prefix, asked))[0]
    figures = told["kinds"]["off-context"]
    assert figures["kl_interval"] == [figures["kl"]] * 2, "three answers to one question: nothing to resample"
    assert figures["tokens"] == sum(len(a.conversation.answer) for a in asked if a.kind == "off-context")


def test_what_an_answer_recites_is_not_in_its_own_words(model, prefix):
    asked = [
        questions.Question(text="?", kind="on-context", conversation=Conversation([9], answer), number=number)
        for number, answer in enumerate(([7, *prefix[20:30], 7, *prefix[3:10]], prefix[:8], [5, 6]))
    ]
    mask = questions.recited(prefix, asked)
    assert mask.tolist() == [False, *[True] * 10, *[False] * 8, *[True] * 8, False, False]
    compared = methods.build(make_context(model, prefix), {"it": toys.picked(model, prefix, 9, TOKENIZER)}, [])
    compared = methods.measure(make_context(model, prefix), compared, asked)
    told = summary.summaries(compared, asked, {m.label: [] for m in compared}, mask)[0]["kinds"]
    assert (told["own words"]["tokens"], told["on-context"]["tokens"]) == (11, 29)
    kl = compared[0].divergence.kl
    assert told["own words"]["kl"] == pytest.approx(kl[~mask].mean(), rel=1e-4)


def test_files_of_one_size_share_their_baselines(model, prefix):
    files = {str(n): toys.picked(model, prefix, n, TOKENIZER) for n in (30, 60, 61)}
    assert methods.distinct_sizes(files) == {"30": files["30"].nbytes, "60": files["60"].nbytes}
    assert methods.distinct_sizes({n: files[n] for n in ("61", "60")}) == {"61": files["60"].nbytes}


def test_files_of_several_kinds_are_told_apart(model, prefix):
    files = {"a": toys.picked(model, prefix, 30, TOKENIZER), "b": toys.exact(model, prefix, TOKENIZER)}
    told = run_evaluation(model, TOKENIZER, files, options=FAST)
    assert [m["method"] for m in told["methods"]] == ["nectar, quadrature", "nectar, exact", "no context"]
    assert "nectar, exact" in summary.table(told)


def test_generation_keeps_the_order_of_questions(model, prefix):
    ctx = make_context(model, prefix)
    asked = [
        questions.Question(text=q, kind="on-context", conversation=Conversation(ctx.ask(q)))
        for q in ("A rather long question about the casks of amber?", "Who?", "Which year was it?")
    ]
    exact = toys.exact(model, prefix, TOKENIZER)
    view = answers.View(banks=exact.banks, start=len(prefix), nbytes=0)
    together = answers.generate(ctx, view, asked, seed=0, temperature=1e-6, max_tokens=4)
    alone = [answers.generate(ctx, view, [a], seed=0, temperature=1e-6, max_tokens=4)[0] for a in asked]
    assert together == alone


@pytest.mark.parametrize(
    ("answer", "expected", "found"),
    [("It was in 1847.", "1847", True), ("It was in 1847.", "18", False), ("anna velde, I think", "Anna Velde", True),
     ("1,847 casks", "1847", True), ("On 4 May, 1847", "4 May 1847", True), ("", "x", False)],
)  # fmt: skip
def test_an_answer_holds_the_fact(answer, expected, found):
    assert questions.contains(answer, expected) is found


def test_rank_correlation():
    assert answers.rank_correlation([1, 2, 3, 4], [10, 100, 1000, 1e4]) == pytest.approx(1)
    assert answers.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    ties = answers.rank_correlation([1, 2, 2, 4], [1, 3, 2, 4])
    assert ties == pytest.approx(0.9487, abs=1e-4)
    assert answers.rank_correlation([1, 2], [1, 2]) is None and answers.rank_correlation([1, 1, 1], [1, 2, 3]) is None


def test_the_command(model, prefix, tmp_path, capsys):
    folder = toys.save_model(model, tmp_path / "model", TOKENIZER)
    file = tmp_path / "it.nectar"
    toys.picked(model, prefix, 20, TOKENIZER).save(file)
    page = tmp_path / "page.html"
    common = [str(file), "--model", str(folder), "--count", "2", "--answer-tokens", "6", "--rows", "200"]
    code = evaluate.main([*common, "--baselines", "sinks-window", "--yes", "--json", "--report", str(page)])
    out, err = capsys.readouterr()
    assert code == 0, err
    told = json.loads(out)
    assert [m["method"] for m in told["methods"]] == ["nectar", "no context", "sinks + window"]
    assert math.isfinite(told["methods"][0]["kl"]) and page.read_text().startswith("<!doctype html>")
    assert "<h3>later turn</h3>" in page.read_text()
    assert evaluate.main([*common, "--baselines", "none", "--no-answers"]) == 0
    out = capsys.readouterr().out
    assert "nectar" in out and "  later turn" in out


@pytest.mark.parametrize(
    "arguments",
    [["--baselines", "magic"], ["--count", "0"], ["--report", "/no/such/folder/page.html"], ["--questions", "/none"]],
    ids=" ".join,
)
def test_mistakes_are_one_line_and_exit_code_2(model, prefix, tmp_path, capsys, arguments):
    folder = toys.save_model(model, tmp_path / "model", TOKENIZER)
    file = tmp_path / "it.nectar"
    toys.picked(model, prefix, 20, TOKENIZER).save(file)
    assert evaluate.main([str(file), "--model", str(folder), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1].startswith("nectar evaluate: ")


def test_a_download_is_asked_for(model, prefix, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("NECTAR_CACHE", str(tmp_path))
    assert evaluate.main(["missing.nectar"]) == 2
    assert capsys.readouterr().err == "nectar evaluate: missing.nectar: no such file\n", (
        "nothing is to be fetched for it"
    )
    toys.picked(model, prefix, 20, TOKENIZER).save(file := tmp_path / "it.nectar")
    assert evaluate.main([str(file)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "84 MB" in err and "--yes fetches it" in err
    for answer in (True, False):
        monkeypatch.setattr(evaluate.terminal, "confirm", lambda question, otherwise, answer=answer: answer)
        assert evaluate._options(evaluate._parser().parse_args([str(file)])).fetch is answer
    assert evaluate._options(evaluate._parser().parse_args([str(file), "--yes"])).fetch


def test_without_leave_nothing_is_fetched(model, monkeypatch, tmp_path):
    monkeypatch.setenv("NECTAR_CACHE", str(tmp_path))
    name, _ = similarity.load(model, TOKENIZER, fetch=False)
    assert name == "the model's mean hidden states"
