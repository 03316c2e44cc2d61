"""MMMU by the official rules. Expected values follow from the rules as the authors' eval_utils.py states them."""

import json
from pathlib import Path
from random import Random

import pytest

import evaluate
from scripts.tasks import mmmu
from tests.helpers import bench

OPTIONS = {"A": "red fox", "B": "Blue whale", "C": "12.5 cm", "D": "<image 1>"}


def choose(response: str) -> str | None:
    return mmmu.parse_choice(response, list(OPTIONS), OPTIONS)


@pytest.mark.parametrize(
    "response, letter",
    [
        ("B", "B"),
        ("B.", "B"),  # marks at the ends fall away
        ("(B)", "B"),
        ("The answer is (B).", "B"),
        ("The answer is B.", "B"),
        ("A or B", "B"),  # several bare ones: the last
        ("(A), no, (C), not (B)", "B"),  # several in brackets: the last
        ("(C) because A is wrong and D too", "C"),  # brackets go before bare letters
        ("(B), then (A), then (B) again", "B"),  # its last place counts, not its first
        ("A bird is seen", "A"),  # an article is a bare letter: the rule's own weakness
        ("B) Blue whale", None),  # a letter glued to a bracket is no bare letter, and three words are too few
        ("It must be the blue whale of course", "B"),  # more than five words: the option's text, in any case
        ("It is the blue whale", None),  # five words
        ("first the red fox, then the Blue Whale, at last the red fox", "A"),
        ("it is 12.5 CM long, I do think", "C"),
        ("E", None),
        ("(E) is what I would say here now", None),
        ("b", None),  # small letters are no choices
        ("", None),
        ("\nB\n", None),  # lines' ends are no spaces
        ("Answer:\n B ", "B"),
        ("'B'", "B"),
        ("B'.", "B"),
        ("B.'", None),  # marks are stripped in the order , . ! ? ; : ' and once: this point stays
    ],
)
def test_choice(response, letter):
    assert choose(response) == letter


def test_choice_of_equal_places_is_the_first():
    """Two options of one text stand at the same place; the authors' argmax takes the first."""
    options = {"A": "same thing", "B": "same thing"}
    assert mmmu.parse_choice("well, it is the same thing I guess", ["A", "B"], options) == "A"


def test_random_choices_are_those_of_seed_42_in_the_order_of_the_file():
    letters = ["A", "B", "C", "D"]
    rng = Random(42)
    expected = [rng.choice(letters) for _ in range(8)]
    assert expected[:4] == ["A", "A", "C", "B"]  # Python's generator, for good
    response = {"question_type": "multiple-choice", "all_choices": letters, "index2ans": OPTIONS, "response": "no idea"}
    responses = [response | {"id": f"validation_Art_{i}", "answer": letter} for i, letter in enumerate(expected)]
    assert all(line["correct"] for line in mmmu.score_responses(responses))
    clear = response | {"id": "validation_Art_9", "answer": "D", "response": "D"}  # draws no random choice
    assert all(line["correct"] for line in mmmu.score_responses([clear, *responses]))


@pytest.mark.parametrize(
    "answer, response, right",
    [
        ("12.5", "12.5", True),
        ("12.5", "12.50", True),
        ("12.5", "12.504", True),  # two decimals
        ("12.5", "12.51", False),
        ("12.5", "The answer is 12.5 cm.", True),  # a number among words
        ("1,234", "1234", True),
        ("1234", "it is $1,234 in total", True),
        ("1234", "1,234,000", False),
        ("1500", "1.5e3", True),
        ("-3", "x = -3", True),
        ("3", "x = -3", False),
        ("0.5", "So .5 it is", True),
        ("fox", "A red fox", True),  # the right answer is part of the reply
        ("red fox", "fox", False),  # not the other way round
        ("Fox", "FOX", True),
        ("x", "x", True),  # one letter needs a space next to it, and gets one where it is the whole reply
        ("x", "axe", False),
        ("x", "the x there", True),
        (["Red fox", "fox"], "It is a fox.", True),
        (["7", "seven"], "Seven", True),
        (["7", "8"], "the result is 8", True),
        (["7", "8"], "9", False),
        ("9", "first 3\nthen 9", True),  # no key phrase: the whole reply and its numbers
        ("3", "The answer is 3\nso the final answer is 9", True),  # every line with a key phrase counts
        ("5", "The answer is 3, 5 was wrong. Because of it", True),
        ("5", "a = 5\nso x is 3", False),  # = is a sign in the last line only, and the first has no other
        ("3", "so it is is 3", True),  # the shortest rest
        ("4", "4 is", True),  # no rest: the whole reply
        ("10", "10%", True),
        ("1", "1/3", True),  # 1 and 3 are numbers in it
        ("", "anything", True),  # the empty text is part of every other
    ],
)
def test_open(answer, response, right):
    assert mmmu.judge_open(answer, mmmu.parse_open(response)) == right


@pytest.mark.parametrize(
    "text, numbers",
    [
        ("1,234 and 5.5 and 1e-3 and .25", {"1,234", "234", "1e-3", "-3", "5.5", ".25"}),
        ("-7 of 12", {"-7", "12"}),
        ("1,234", {"1,234", "234"}),  # the plain pattern sees what is behind a comma, or behind an e
        ("3cm", set()),  # digits must end at a word's end
    ],
)
def test_numbers(text, numbers):
    assert set(mmmu.find_numbers(text)) == numbers


def test_subjects():
    assert len(mmmu.DISCIPLINES) == 6 and len(mmmu.SUBJECTS) == 30
    assert mmmu.subject_of("validation_Art_Theory_12") == "Art_Theory"
    assert mmmu.DISCIPLINE_OF[mmmu.subject_of("test_Math_400")] == "Science"


def ask(item: dict) -> list[dict]:
    (parts,) = mmmu.ask(mmmu.prepare(item, "Math"))
    return parts


def test_prompt_of_multiple_choice():
    parts = ask(bench.make_item("Math", 1, "Is <image 1> it?", ["yes", "no"], "A"))
    assert [part["type"] for part in parts] == ["text", "image", "text"]
    text = "".join(part.get("text", "<>") for part in parts)
    assert text == ("Is <> it?\n\n(A) yes\n(B) no\n\nAnswer with the option's letter from the given choices directly.")


def test_prompt_of_open_question():
    parts = ask(bench.make_item("Math", 1, "How much?", [], "12"))
    assert [part["type"] for part in parts] == ["image", "text"], "an image that is not cited stands in front"
    assert parts[1]["text"] == "How much?\n\nAnswer the question using a single word or phrase."


def shown(parts: list[dict]) -> list[int]:
    return [int(part["path"].rpartition("_")[2]) for part in parts if part["type"] == "image"]


def test_images_follow_the_placeholders():
    items = bench.make_subject("Math")
    assert shown(ask(items[2])) == [1, 2, 3], "in options"
    assert shown(ask(items[3])) == [2, 1, 2], "in the order of the text, and twice"
    assert shown(ask(items[4])) == [1, 2, 3, 1], "in question and options"
    assert shown(ask(items[7])) == [1, 2, 3, 4, 5, 6, 7]


def test_nothing_leaks():
    for item in bench.make_subject("Math"):
        text = "".join(part.get("text", "") for part in ask(item))
        assert bench.EXPLANATION not in text and "Made up" not in text and "Easy" not in text
        if item["question_type"] == "open":
            assert item["answer"] not in text


@pytest.mark.parametrize(
    "change, words",
    [
        ({"options": "[]"}, "without options"),
        ({"options": "['a', "}, "without options"),
        ({"options": None}, "without options"),
        ({"image_1": None}, "no such image"),
        ({"question": "See <image 9>"}, "no such image"),
    ],
)
def test_question_that_cannot_be_asked(change, words):
    item = bench.make_item("Math", 1, "See <image 1>", ["a", "b"], "A") | change
    with pytest.raises(ValueError, match=words):
        ask(item)


def score(tmp_path, capsys, lines: list) -> tuple[int, dict, str]:
    path = bench.write_jsonl(tmp_path / "responses.jsonl", lines)
    status = evaluate.main(["--bench_name", "MMMU", "--score", str(path)])
    out, err = capsys.readouterr()
    return status, bench.read_summary(out) if out else {}, err


def choice_response(subject: str, i: int, answer, response: str) -> dict:
    choices = {"all_choices": list(OPTIONS), "index2ans": OPTIONS}
    identity = {"id": f"validation_{subject}_{i}", "question_type": "multiple-choice"}
    return identity | choices | {"answer": answer, "response": response}


def test_score_command(tmp_path, capsys):
    lines = [
        choice_response("Accounting", 1, "B", "(B) Blue whale"),
        choice_response("Accounting", 2, "B", "C"),
        choice_response("Finance", 1, ["A", "B"], "A"),
        {"id": "validation_Music_3", "question_type": "short-answer", "answer": "30", "response": "36 watts"},
        {"id": "validation_Math_3", "question_type": "open", "answer": ["30", "thirty"], "response": "Thirty."},
    ]
    status, summary, err = score(tmp_path, capsys, lines)
    assert (status, err) == (0, "")
    assert (summary["accuracy"], summary["correct"], summary["total"]) == (0.6, 3, 5)
    assert summary["disciplines"]["Business"] == {"accuracy": 2 / 3, "correct": 2, "total": 3}
    assert summary["subjects"]["Accounting"] == {"accuracy": 0.5, "correct": 1, "total": 2}
    assert summary["disciplines"]["Art and Design"]["correct"] == 0


# What the official rules make of data/mmmu_example_outputs.jsonl, worked out by hand: a letter in brackets counts,
# "Project A" holds a bare A, no open reply names its number, three replies name nothing: A, A and C are drawn.
RIGHT = {
    "Accounting": [45, 246, 282, 302, 329, 365, 386],
    "Electronics": [14, 76, 86, 107, 168, 190, 210, 232],
}


def test_official_example_outputs(tmp_path, capsys):
    """BLIP-2's answers that the authors publish beside their evaluation (github MMMU-Benchmark/MMMU, Apache 2.0)."""
    path = Path(__file__).parent / "data" / "mmmu_example_outputs.jsonl"
    scored = mmmu.score_responses(mmmu.read_responses(path))
    right = [response["id"] for response in scored if response["correct"]]
    assert right == [f"validation_{subject}_{i}" for subject, numbers in RIGHT.items() for i in numbers]
    assert [response["id"] for response in scored if response.get("guessed")] == [
        "validation_Accounting_274",
        "validation_Electronics_216",
        "validation_Electronics_232",
    ]
    assert evaluate.main(["--bench_name", "MMMU", "--score", str(path)]) == 0
    summary = bench.read_summary(capsys.readouterr().out)
    assert (summary["correct"], summary["total"]) == (15, 60)
    assert summary["subjects"]["Electronics"] == {"accuracy": 8 / 30, "correct": 8, "total": 30}


@pytest.mark.parametrize(
    "line, words",
    [
        ([], "JSON object"),
        ({"id": "validation_Art_1"}, "question_type"),
        (choice_response("Art", 1, "A", "B") | {"all_choices": []}, "all_choices"),
        (choice_response("Art", 1, "A", "B") | {"response": None}, "response"),
        (choice_response("Art", 1, "A", "B") | {"answer": 3}, "answer"),
        (choice_response("Art", 1, "A", "B") | {"index2ans": {"A": 3}}, "texts"),
    ],
)
def test_score_of_a_bad_line(tmp_path, capsys, line, words):
    status, summary, err = score(tmp_path, capsys, [choice_response("Art", 1, "A", "B"), line])
    assert status == 2 and not summary and err.count("\n") == 1 and "line 2" in err and words in err


def test_score_without_a_file(tmp_path, capsys):
    assert evaluate.main(["--bench_name", "MMMU", "--score", str(tmp_path / "nowhere.jsonl")]) == 2
    assert evaluate.main(["--score", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 2


REPLIES = {  # to the ten questions of a subject, and whether each is right
    1: ("(B) $300", True),
    2: ("The color that is shown there is green", False),
    3: ("C", True),
    4: ("B", False),
    5: ("I choose (E).", True),
    6: ("It is 12.50 cm", True),
    7: ("a fox", True),
    8: ("A", False),
    9: ("1234", True),
    10: ('I believe that it is the a "b" one', True),
}


def run_mmmu(capsys, *flags) -> tuple[int, dict, list[str]]:
    status = evaluate.main(["--bench_name", "MMMU", "--device", "cpu", *map(str, flags)])
    out, err = capsys.readouterr()
    return status, bench.read_summary(out) if out else {}, err.splitlines()


@pytest.fixture
def asked(monkeypatch, tmp_path_factory) -> list[dict]:
    """The engine is one that answers from REPLIES; the requests that it got."""
    requests = []

    def answer(engine, tokenizer, request, **options):
        requests.append(request)
        paths = [part["path"] for part in request["messages"][-1]["content"] if part["type"] == "image"]
        number = int(paths[0].split()[0].rpartition("_")[2])
        return bench.stub_result(REPLIES[number][0])

    monkeypatch.setattr(evaluate, "answer", answer)
    bench.install_stub(monkeypatch, tmp_path_factory.mktemp("checkpoint"), answer)
    return requests


def test_parquet_to_summary(asked, tmp_path, capsys):
    """30 items through the real reader; scripted replies; accuracy as worked out by hand, and again by --score."""
    pytest.importorskip("pyarrow")
    data, output = bench.write_mmmu(tmp_path / "data"), tmp_path / "out.jsonl"
    status, summary, err = run_mmmu(capsys, "--data_dir", data, "--output", output, "--warmup", 0)
    assert status == 0 and (summary["correct"], summary["total"], summary["failed"]) == (21, 30, 0)
    assert summary["disciplines"] == {
        name: {"accuracy": 0.7, "correct": 7, "total": 10} for name in ("Art and Design", "Business", "Science")
    }
    assert list(summary["subjects"]) == bench.SUBJECTS
    for request, subject in zip(asked[::10], bench.SUBJECTS):
        assert request["messages"][0]["content"][1]["path"] == f"validation_{subject}_1 image_1"
    colors = [part["image"].getpixel((5, 5)) for part in asked[3]["messages"][0]["content"] if "image" in part]
    assert colors == [bench.color_of(2), bench.color_of(1), bench.color_of(2)]
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(lines) == 31 and lines[0]["settings"]["bench_name"] == "MMMU"
    assert [line["correct"] for line in lines[1:11]] == [right for _, right in REPLIES.values()]
    assert lines[7]["answer"] == ["Red fox", "fox"]
    assert bench.EXPLANATION not in output.read_text()
    assert run_mmmu(capsys, "--score", output)[1]["correct"] == 21


def test_part_of_mmmu(asked, tmp_path, capsys):
    pytest.importorskip("pyarrow")
    data = bench.write_mmmu(tmp_path)
    _, summary, err = run_mmmu(capsys, "--data_dir", data, "--num_questions", 6, "--warmup", 2)
    assert [each["total"] for each in summary["subjects"].values()] == [2, 2, 2], "every subject has its part"
    assert len(asked) == 6 + 2, "the first two were asked before, and not counted"
    assert any("27 are not in" in line for line in err)
    _, summary, _ = run_mmmu(capsys, "--data_dir", data, "--subjects", "Math")
    assert list(summary["subjects"]) == ["Math"]


def test_bad_questions_do_not_end_the_run(asked, tmp_path, capsys):
    pytest.importorskip("pyarrow")
    items = bench.make_subject("Math")
    items[0]["image_1"]["bytes"] = items[0]["image_1"]["bytes"][:60]
    items[1]["image_1"]["bytes"] = b"no picture"
    items[2]["options"] = "[]"
    items[3]["image_2"] = None
    bench.write_parquet(tmp_path / "data/Math/validation-00000-of-00001.parquet", items)
    output = tmp_path / "out.jsonl"
    status, summary, err = run_mmmu(capsys, "--data_dir", tmp_path / "data", "--output", output, "--warmup", 0)
    assert status == 0 and (summary["failed"], summary["total"], summary["correct"]) == (4, 10, 5)
    errors = [json.loads(line).get("error") for line in output.read_text().splitlines()[1:]]
    assert all("cannot be decoded" in error for error in errors[:2])
    assert "without options" in errors[2] and "no such image" in errors[3] and errors[4:] == [None] * 6
    assert sum(line.startswith("validation_Math_") for line in err) == 4


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda file: file.write_bytes(b"PAR1 no parquet"), "cannot read"),
        (lambda file: file.write_bytes(file.read_bytes()[:-2000]), "cannot read"),
        (lambda file: file.write_bytes(b""), "cannot read"),
        (lambda file: file.unlink(), "holds no validation-*.parquet"),
    ],
)
def test_damaged_file(asked, tmp_path, capsys, damage, words):
    pytest.importorskip("pyarrow")
    file = tmp_path / "Math/validation-00000-of-00001.parquet"
    bench.write_parquet(file, bench.make_subject("Math"))
    damage(file)
    status, summary, err = run_mmmu(capsys, "--data_dir", tmp_path, "--subjects", "Math")
    assert status == 2 and not summary and len(err) == 1 and words in err[0] and "Math" in err[0]


def test_other_parquet_file(asked, tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "Math").mkdir()
    parquet.write_table(pyarrow.table({"id": ["a"]}), tmp_path / "Math/validation-00000-of-00001.parquet")
    status, _, err = run_mmmu(capsys, "--data_dir", tmp_path)
    assert status == 2 and "no column question" in err[-1]


def test_without_pyarrow(asked, tmp_path, capsys, monkeypatch):
    (tmp_path / "Math").mkdir()
    (tmp_path / "Math/validation-00000-of-00001.parquet").write_bytes(b"")
    monkeypatch.setitem(evaluate.sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(evaluate.sys.modules, "pyarrow", None)
    status, _, err = run_mmmu(capsys, "--data_dir", tmp_path, "--subjects", "Math")
    assert status == 2 and "pip install pyarrow" in err[0]


def test_tiny_model_end_to_end(pair, tmp_path, capsys):
    """The real engine, from parquet to --score: random weights give nonsense, and every reply is judged."""
    pytest.importorskip("pyarrow")
    data, output = bench.write_mmmu(tmp_path / "data"), tmp_path / "out.jsonl"
    path = pair("qwen2.5-vl").path
    flags = ["--checkpoint_path", path, "--dtype", "float32", "--max_new_tokens", 4]
    flags += ["--draft_checkpoint_path", path, "--compare"]
    status, summary, err = run_mmmu(capsys, *flags, "--data_dir", data, "--output", output)
    assert status == 0 and (summary["total"], summary["failed"]) == (30, 0)
    lines = [json.loads(line) for line in output.read_text().splitlines()[1:]]
    lines = [line for line in lines if line["variant"] == "target"]
    n_visual = [line["turns"][0]["n_visual_tokens"] for line in lines[:10]]
    assert n_visual == [4 * n for n in (1, 1, 3, 3, 4, 1, 1, 7, 1, 1)], (
        "four rows an image of 56 x 56, as often as cited"
    )
    assert run_mmmu(capsys, "--score", output)[1]["correct"] == summary["correct"]
