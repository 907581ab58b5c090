"""Arguments that people get wrong: one line that says what was meant."""

import pytest

from nectar_mlx import add, ask, bench, cli, fit


@pytest.mark.parametrize(
    "command, arguments, said",
    [
        (fit, ["--contxt", "book.txt"], "nectar fit: there is no option --contxt; did you mean --context?"),
        (fit, ["-context", "book.txt"], "nectar fit: there is no option -context; did you mean --context?"),
        (fit, ["--context", "book.txt", "--budgt=2%"], "there is no option --budgt; did you mean --budget?"),
        (ask, ["book.nectar", "who?", "--zzz"], "nectar ask: there is no option --zzz (see nectar ask --help)"),
        (ask, ["book.nectar"], "nectar ask: question is missing: the question, in quotes or not"),
        (fit, ["book.txt"], "nectar fit: --context is missing: files and folders to read (see nectar fit --help)"),
        (add, [], "nectar add: PATH is missing: files and folders"),
        (bench, [], "nectar bench: WHAT is missing: decode, fit or selftest"),
    ],
)
def test_an_option_that_there_is_not_is_named_with_the_one_that_was_meant(command, arguments, said, capsys):
    assert command.main(arguments) == cli.FAULT
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


@pytest.mark.parametrize("words", [["--", "--zzz"], ["what is --zzz there?"], ["-"], ["-5"]])
def test_words_of_a_question_are_no_options(words, tmp_path, capsys):
    ask.main([str(tmp_path / "no.nectar"), *words])
    assert "no option" not in capsys.readouterr().err


def test_a_file_whose_fit_has_not_ended(tmp_path, capsys):
    (tmp_path / "book.nectar.partial").mkdir()
    assert ask.main([str(tmp_path / "book.nectar"), "who?"]) == cli.FAULT
    assert "its fit still runs, or the same `nectar fit` continues it" in capsys.readouterr().err
