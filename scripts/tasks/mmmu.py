"""MMMU (arXiv 2311.16502): its files, its prompts, and the official parsing and scoring of answers.

Knows the parquet files of MMMU/MMMU on Hugging Face and the rules of the authors' evaluation (github
MMMU-Benchmark/MMMU, eval_utils.py). Does not know models, tokenizers or timing.

Their surprising rules are kept, so that figures can be compared with theirs; a comment names each.
"""

import ast
import json
import re
from pathlib import Path
from random import Random

HUB_REPO = "MMMU/MMMU"
DISCIPLINES = {
    "Art and Design": ["Art", "Art_Theory", "Design", "Music"],
    "Business": ["Accounting", "Economics", "Finance", "Manage", "Marketing"],
    "Science": ["Biology", "Chemistry", "Geography", "Math", "Physics"],
    "Health and Medicine": [
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ],
    "Humanities and Social Science": ["History", "Literature", "Sociology", "Psychology"],
    "Tech and Engineering": [
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ],
}
DISCIPLINE_OF = {subject: name for name, subjects in DISCIPLINES.items() for subject in subjects}
SUBJECTS = sorted(DISCIPLINE_OF)  # the order of the official evaluation, on which its random choices depend
SEED = 42  # of the random choices
COLUMNS = ["id", "question", "options", "answer", "question_type"]  # what an answer may depend on: no explanation
MAX_IMAGES = 7
MULTIPLE_CHOICE = "multiple-choice"
CHOICE_INSTRUCTION = "Answer with the option's letter from the given choices directly."
OPEN_INSTRUCTION = "Answer the question using a single word or phrase."
PLACEHOLDER = re.compile(r"<image (\d+)>")


# ---- files ---------------------------------------------------------------------------------------------------------


def load(folder: Path, subjects: list[str], split: str) -> list[dict]:
    """The questions of the folder SUBJECT/SPLIT-*.parquet of each subject. ValueError for files that are of no use."""
    questions = []
    for subject in subjects:
        paths = sorted((folder / subject).glob(f"{split}-*.parquet"))
        if not paths:
            raise ValueError(f"{folder / subject} holds no {split}-*.parquet, the file of MMMU's subject {subject}")
        questions += [prepare(row, subject) for path in paths for row in read_parquet(path, COLUMNS)]
    return questions


def read_parquet(path: Path, columns: list[str]) -> list[dict]:
    """The rows of a file. Raises ValueError, one line, if it cannot be read or lacks one of the columns."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"reading {path} needs pyarrow: pip install pyarrow") from None
    try:
        rows = pyarrow.parquet.ParquetFile(path).read().to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"cannot read {path}: {' '.join(str(error).split())[:200]}") from None
    if rows and (missing := [name for name in columns if name not in rows[0]]):
        raise ValueError(f"{path} is no file of this benchmark: it has no column {', '.join(missing)}")
    return rows


def prepare(row: dict, subject: str) -> dict:
    """A question with the fields of the official evaluation. A bad question raises only in ask()."""
    question = {name: row[name] for name in COLUMNS} | groups_of(subject)
    question["answer"] = as_list(row["answer"]) or row["answer"]
    question["options"] = as_list(row["options"])
    if row["question_type"] == MULTIPLE_CHOICE and question["options"]:
        question["all_choices"] = [chr(ord("A") + i) for i in range(len(question["options"]))]
        question["index2ans"] = dict(zip(question["all_choices"], question["options"]))
    return question | {f"image_{i}": row.get(f"image_{i}") for i in range(1, MAX_IMAGES + 1)}


def groups_of(subject: str) -> dict:
    """The fields under which results are added up; "discipline" where the subject is one of the official ones."""
    discipline = {"discipline": DISCIPLINE_OF[subject]} if subject in DISCIPLINE_OF else {}
    return {"subject": subject, "group": subject} | discipline


def as_list(value) -> list[str] | None:
    """A list, or the list that a text such as "['a', 'b']" stands for; None for anything else."""
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            return None
    return [str(item) for item in value] if isinstance(value, list) else None


def spread(questions: list[dict], n: int) -> list[dict]:
    """n questions at even distances, so that a subset of the benchmark still has all subjects."""
    return [questions[i * len(questions) // n] for i in range(n)]


# ---- prompts -------------------------------------------------------------------------------------------------------


def ask(question: dict) -> list[list[dict]]:
    """The one user turn, as parts of text and {"type": "image", "path", "bytes"}, each image where it is cited.

    An image that is cited twice is shown twice; where none is cited, they stand in front. Raises ValueError for a
    question that cannot be asked. The prompt holds nothing but question, options and images.
    """
    text = question["question"]
    if question["question_type"] == MULTIPLE_CHOICE:
        if not question["options"]:
            raise ValueError("a multiple-choice question without options")
        options = [f"({letter}) {option}" for letter, option in question["index2ans"].items()]
        text = "\n".join([text, "", *options, "", CHOICE_INSTRUCTION])
    else:
        text = f"{text}\n\n{OPEN_INSTRUCTION}"
    pieces = PLACEHOLDER.split(text)  # text, number, text, number, ..., text
    parts = [
        image_part(question, piece) if i % 2 else {"type": "text", "text": piece} for i, piece in enumerate(pieces)
    ]
    if len(parts) == 1:
        shown = [i for i in range(1, MAX_IMAGES + 1) if question[f"image_{i}"]]
        parts = [image_part(question, i) for i in shown] + parts
    return [[part for part in parts if part.get("text") != ""]]


def image_part(question: dict, number: int | str) -> dict:
    image = question.get(f"image_{number}") or {}
    if not image.get("bytes"):
        raise ValueError(f"<image {number}> is cited, but there is no such image")
    return {"type": "image", "path": f"{question['id']} image_{number}", "bytes": image["bytes"]}


# ---- official parsing and scoring ----------------------------------------------------------------------------------


def score(question: dict, replies: list[str], rng: Random) -> dict:
    """The official verdict on a reply. One rng, seeded with SEED, serves all questions of a run, in their order."""
    if question["question_type"] == MULTIPLE_CHOICE:
        choice = parse_choice(replies[0], question["all_choices"], question["index2ans"])
        parsed = choice or rng.choice(question["all_choices"])
        answers = question["answer"] if isinstance(question["answer"], list) else [question["answer"]]
        return {"correct": parsed in answers, "parsed": parsed, "guessed": choice is None}
    parsed = parse_open(replies[0])
    return {"correct": judge_open(question["answer"], parsed), "parsed": sorted(map(str, parsed))}


def parse_choice(response: str, letters: list[str], options: dict[str, str]) -> str | None:
    """The letter that a reply chooses: the last of those in brackets, else bare, else named by the option's text.

    None if there is none. The options' texts are searched for only in replies of more than five words.
    """
    for mark in ",.!?;:'":  # each kind once, in this order: "A.'" keeps its point
        response = response.strip(mark)
    response = f" {response} "
    for spelling in ("({})", " {} "):
        last = {letter: response.rfind(spelling.format(letter)) for letter in letters}
        if max(last.values()) >= 0:
            return max(last, key=last.get)
    if len(response.split()) > 5:
        last = {letter: response.lower().rfind(text.lower()) for letter, text in options.items()}
        if max(last.values()) >= 0:
            return max(last, key=last.get)
    return None


def parse_open(response: str) -> set[str | float]:
    """What a reply to an open question may have meant: its key phrases and the numbers in them, normalized."""
    phrases = key_phrases(response)
    found = phrases + [number for phrase in phrases for number in find_numbers(phrase)]
    return {value for text in found for value in normalize(text)}


def key_phrases(response: str) -> list[str]:
    """Of each line what follows the last "is ", "answer ", ...: the shortest such rest; all, if no line has one.

    The official rule means to split at sentences too, but searches for capitals after lower-casing.
    """
    response = response.strip().strip(".").lower()
    lines = response.split("\n")
    phrases = []
    for i, line in enumerate(lines):
        signs = ["could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result "]
        signs += ["="] if i == len(lines) - 1 else []  # an equation ends a reply
        phrase = ""
        for rest in (line.split(sign)[-1].strip() for sign in signs if sign in line):
            phrase = rest if not phrase or len(rest) < len(phrase) else phrase
        if phrase and phrase not in set(":,.!?;'"):
            phrases.append(phrase)
    return phrases or [response]


def find_numbers(text: str) -> list[str]:
    """Numbers with commas between thousands, in scientific notation, and plain ones."""
    with_commas = r"-?\b\d{1,3}(?:,\d{3})+\b"
    scientific = r"-?\d+(?:\.\d+)?[eE][+-]?\d+"
    plain = r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"
    return [number for pattern in (with_commas, scientific, plain) for number in re.findall(pattern, text)]


def normalize(text: str) -> list[str | float]:
    """A number, rounded to two decimals, or a text in small letters; one letter only matches next to a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [" " + text, text + " "] if len(text) == 1 else [text]


def judge_open(answer: str | list[str], parsed: set[str | float]) -> bool:
    """True if one of the right answers is contained in a parsed text, or equals a parsed number."""
    answers = [value for text in ([answer] if isinstance(answer, str) else answer) for value in normalize(text)]
    texts = [value for value in answers if isinstance(value, str)]
    return any(any(text in found for text in texts) if isinstance(found, str) else found in answers for found in parsed)


# ---- responses made elsewhere --------------------------------------------------------------------------------------


def read_responses(path: Path) -> list[dict]:
    """The lines of a file of responses with the official evaluation's fields. Raises ValueError for a bad line.

    Our own results file is one too: its first line, the settings, is skipped, and so are questions that failed; of
    several variants the first one counts.
    """
    responses = []
    for i, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            response = json.loads(line)
            if "settings" not in response and "error" not in response:
                check_response(response)
                responses.append(response)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {i}: {error}") from None
    if not responses:
        raise ValueError(f"{path} holds no responses")
    return [response for response in responses if response.get("variant") == responses[0].get("variant")]


def check_response(response: dict) -> None:
    if not isinstance(response, dict):
        raise ValueError("not a JSON object")
    kinds = {"id": str, "question_type": str, "answer": (str, list), "response": str}
    if response.get("question_type") == MULTIPLE_CHOICE:
        kinds |= {"all_choices": list, "index2ans": dict}
    for name, kind in kinds.items():
        if not isinstance(response.get(name), kind) or response[name] in ("", []) and name != "response":
            raise ValueError(f"the field {name!r} is missing or of the wrong kind")
    texts = [*response.get("index2ans", {}).values(), *response.get("all_choices", []), *response["answer"]]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("answers, choices and options must be texts")


def subject_of(question_id: str) -> str:
    """validation_Art_Theory_12 is a question of Art_Theory."""
    return question_id.partition("_")[2].rpartition("_")[0] or question_id


def score_responses(responses: list[dict]) -> list[dict]:
    """The responses with "correct" and their groups; random choices are drawn in the order of the file."""
    rng = Random(SEED)
    scored = []
    for response in responses:
        verdict = score(response, [response["response"]], rng)
        scored.append(response | verdict | groups_of(subject_of(response["id"])))
    return scored
