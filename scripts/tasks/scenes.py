"""Synthetic scenes with captions, questions and answers: what the tiny models learn and are examined on.

Knows how to draw a scene from a seed (Pillow and the standard library) and what may be asked about it. Does not know
models, tokenizers or chat formats.

A scene is one of three kinds: coloured shapes on a 3-column grid, printed words and numbers (half as often as the
others), or a bar chart whose values stand under the bars. Seven of ten questions that are drawn from scenes ask for a
description or a list, an answer of 15 to 63 tokens; the others ask for a word or a number. The same seed always gives
the same scene. Seeds from HELD_OUT_SEED on are for examinations and are never trained on; VALIDATION_SEED starts the
range that training watches itself with.
"""

from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw, ImageFont

VALIDATION_SEED = 900_000_000
HELD_OUT_SEED = 1_000_000_000
SIZES = [(168, 168), (196, 140), (140, 196), (224, 112)]  # (width, height) in multiples of 28 pixels
CAPTION_PROMPTS = ["Describe the image.", "Describe this image.", "What is in the image?"]

COLORS = {
    "red": (214, 39, 40),
    "green": (44, 150, 60),
    "blue": (40, 80, 220),
    "yellow": (250, 215, 50),
    "orange": (245, 130, 25),
    "purple": (140, 50, 170),
    "pink": (250, 150, 190),
    "black": (25, 25, 25),
}
BACKGROUNDS = {"white": (255, 255, 255), "gray": (190, 190, 190)}
SHAPES = ["circle", "square", "triangle", "diamond", "star", "cross"]
WORDS = "bird book cake cloud cow dog duck eagle frog house ice king lamp milk moon mouse owl ring sun zebra".split()
ORDERS = ["first", "second", "third", "fourth"]
COUNTS = ["0", "1", "2", "3", "4"]
FONT_SIZE, VALUE_SIZE = 36, 24  # of words and numbers, of the values under bars; in pixels
MULTIPLE_CHOICE_SHARE = 0.2
LONG_SHARE = 0.7  # of the held-out questions
INSTRUCTION = "Answer with the option's letter from the given choices directly."
OPEN_INSTRUCTION = "Answer the question using a single word or phrase."  # some benchmarks add it; bare questions work


@dataclass(frozen=True)
class Question:
    """One question about a scene. `answer` is the content ("red"), also when it is one of the `options`."""

    text: str
    answer: str
    options: tuple[str, ...]  # empty for an open question
    kind: str  # what | color | count | where | read | bar; describe | list: a long answer

    @property
    def prompt(self) -> str:
        """What a user types: the bare question, or the question with lettered options in MMMU's format."""
        if not self.options:
            return self.text
        lines = [f"({letter}) {option}" for letter, option in zip("ABCD", self.options)]
        return "\n".join([self.text, "", *lines, "", INSTRUCTION])

    @property
    def reply(self) -> str:
        """What a right model says: the answer, or the letter of the option that holds it."""
        return "ABCD"[self.options.index(self.answer)] if self.options else self.answer


Region = tuple[tuple[float, float, float, float], list[str]]  # left, top, right, bottom in pixels; answers


@dataclass
class Scene:
    kind: str  # shapes | text | bars
    image: Image.Image
    caption: str
    regions: list[Region]  # which words say what is drawn where
    questions: list[Question]  # with short answers
    long_questions: list[Question]  # describe, list


def make_scene(seed: int) -> Scene:
    """Draws the scene of a seed. The size follows from seed % 4, all else from random.Random(seed)."""
    rng = Random(seed)
    size = SIZES[seed % len(SIZES)]
    scene = rng.choice([make_shapes, make_shapes, make_text, make_bars, make_bars])(rng, size)
    rng.shuffle(scene.questions)
    scene.questions = [offer_options(rng, question) for question in scene.questions]
    return scene


def held_out_questions(n: int):
    """Yields n pairs (scene, question) from seeds that no training has seen: one a scene, its kind drawn first."""
    for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + n):
        scene, rng = make_scene(seed), Random(f"kind {seed}")
        questions = scene.long_questions if rng.random() < LONG_SHARE else scene.questions
        kind = rng.choice(sorted({question.kind for question in questions}))
        yield scene, next(question for question in questions if question.kind == kind)


# ---- questions -----------------------------------------------------------------------------------------------------


def offer_options(rng: Random, question: Question) -> Question:
    """Turns some of the questions into multiple choice: the answer among up to three other members of its pool."""
    if rng.random() > MULTIPLE_CHOICE_SHARE:
        return Question(question.text, question.answer, (), question.kind)
    others = sorted({option for option in question.options if option != question.answer})
    options = rng.sample(others, min(3, len(others))) + [question.answer]
    rng.shuffle(options)
    return Question(question.text, question.answer, tuple(options), question.kind)


def ask(rng: Random, kind: str, texts: list[str], answer: str, pool: list[str]) -> Question:
    """A question in one of its wordings; `options` holds the whole pool until offer_options has chosen."""
    return Question(rng.choice(texts), answer, tuple(pool), kind)


def describe(caption: str) -> Question:
    return Question(CAPTION_PROMPTS[0], caption, (), "describe")


def join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


# ---- shapes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Thing:
    shape: str
    color: str
    place: str

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


def grid_places(height: int) -> list[str]:
    """Names of the cells in reading order: three columns, and three rows or (in low images) two."""
    rows = ["top", "center", "bottom"] if height >= 140 else ["top", "bottom"]
    places = [f"{row} {column}" for row in rows for column in ("left", "center", "right")]
    return ["center" if place == "center center" else place for place in places]


def make_shapes(rng: Random, size: tuple[int, int]) -> Scene:
    """One to four things in different cells of the grid. The description goes through all cells in reading order."""
    background = rng.choice(list(BACKGROUNDS))
    image = Image.new("RGB", size, BACKGROUNDS[background])
    places = grid_places(size[1])
    things, regions = [], []
    for cell in sorted(rng.sample(range(len(places)), rng.randint(1, 4))):
        thing = Thing(rng.choice(SHAPES), rng.choice(list(COLORS)), places[cell])
        box = draw_shape(rng, image, thing, (cell % 3, cell // 3), len(places) // 3)
        things.append(thing)
        regions.append((box, [thing.shape, thing.color, thing.place]))
    names = {thing.place: thing.name for thing in things}
    items = ", ".join(f"{place} {names.get(place, 'empty')}" for place in places)
    caption = f"Shapes on a {background} background: {items}."
    listed = Question("List the shapes by place.", items, (), "list")
    questions = shape_questions(rng, things, places, background)
    return Scene("shapes", image, caption, regions, questions, [describe(caption), listed])


def draw_shape(rng: Random, image: Image.Image, thing: Thing, cell: tuple[int, int], n_rows: int) -> tuple:
    """Paints a shape into its cell (column, row), with some freedom in size, place and tint. Returns its box."""
    width, height = image.size[0] / 3, image.size[1] / n_rows
    radius = min(width, height) / 2 * rng.uniform(0.75, 0.92)
    x = (cell[0] + 0.5) * width + rng.uniform(-1, 1) * (width / 2 - radius) * 0.8
    y = (cell[1] + 0.5) * height + rng.uniform(-1, 1) * (height / 2 - radius) * 0.8
    outline = [(x + radius * dx, y + radius * dy) for dx, dy in OUTLINES[thing.shape]]
    box = (x - radius, y - radius, x + radius, y + radius)
    draw = ImageDraw.Draw(image)
    if thing.shape == "circle":
        draw.ellipse(box, fill=tint(rng, thing.color))
    else:
        draw.polygon(outline, fill=tint(rng, thing.color))
    return box


def tint(rng: Random, color: str) -> tuple[int, ...]:
    return tuple(min(255, max(0, channel + rng.randint(-10, 10))) for channel in COLORS[color])


OUTLINES = {  # corners in units of the radius, y downwards
    "circle": [],
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -1), (0.95, 0.85), (-0.95, 0.85)],
    "diamond": [(0, -1), (0.75, 0), (0, 1), (-0.75, 0)],
    "star": [(0, -1), (0.25, -0.33), (0.95, -0.31), (0.4, 0.12), (0.59, 0.81)]
    + [(0, 0.42), (-0.59, 0.81), (-0.4, 0.12), (-0.95, -0.31), (-0.25, -0.33)],
    "cross": [(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3)]
    + [(0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)],
}


def shape_questions(rng: Random, things: list[Thing], places: list[str], background: str) -> list[Question]:
    colors = list(COLORS)
    count = [f"How many {noun} are there?" for noun in ("objects", "shapes")]
    questions = [
        ask(rng, "count", count, str(len(things)), COUNTS[1:]),
        ask(rng, "color", ["What color is the background?"], background, list(BACKGROUNDS)),
        ask_count(rng, things, "shape", rng.choice([rng.choice(things).shape, rng.choice(SHAPES)])),
        ask_count(rng, things, "color", rng.choice([rng.choice(things).color, rng.choice(colors)])),
    ]
    for thing in things:
        shape_at = [f"What shape is in the {thing.place}?", f"Which shape is in the {thing.place}?"]
        color_at = [f"What color is the object in the {thing.place}?"]
        questions += [
            ask(rng, "what", shape_at, thing.shape, SHAPES),
            ask(rng, "color", color_at, thing.color, colors),
        ]
        if [other.color for other in things].count(thing.color) == 1:
            texts = [f"What shape is the {thing.color} object?", f"What is the {thing.color} object?"]
            questions.append(ask(rng, "what", texts, thing.shape, SHAPES))
        if [other.shape for other in things].count(thing.shape) == 1:
            texts = [f"What color is the {thing.shape}?", f"Which color is the {thing.shape}?"]
            questions.append(ask(rng, "color", texts, thing.color, colors))
            questions.append(ask(rng, "where", [f"Where is the {thing.shape}?"], thing.place, places))
        if [other.name for other in things].count(thing.name) == 1:
            questions.append(ask(rng, "where", [f"Where is the {thing.name}?"], thing.place, places))
    return questions


def ask_count(rng: Random, things: list[Thing], attribute: str, value: str) -> Question:
    """How many things have this shape or this colour; the answer may be 0."""
    count = [getattr(thing, attribute) for thing in things].count(value)
    noun = f"{value} objects" if attribute == "color" else plural(value)
    return ask(rng, "count", [f"How many {noun} are there?"], str(count), COUNTS)


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


# ---- printed words and numbers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    text: str
    color: str
    place: str

    @property
    def noun(self) -> str:
        return "number" if self.text.isdigit() else "word"


def make_text(rng: Random, size: tuple[int, int]) -> Scene:
    """A word or a number in the center, or two lines one above the other."""
    background = rng.choice(list(BACKGROUNDS))
    image = Image.new("RGB", size, BACKGROUNDS[background])
    places = rng.choice([["center"], ["top", "bottom"], ["top", "bottom"]])
    colors = rng.sample(list(COLORS), len(places))
    texts = [rng.choice(WORDS) if rng.random() < 0.7 else str(rng.randint(10, 99)) for _ in places]
    lines = [Line(*line) for line in zip(texts, colors, places)]
    regions = []
    for index, line in enumerate(lines):
        regions += draw_line(rng, image, line, (index + 0.5) / len(lines))
    items = join([f"the {line.noun} {line.text} in {line.color} at the {line.place}" for line in lines])
    caption = f"The image shows {items}, printed on a {background} background."
    layout = ", ".join(f"the {line.place} is a {line.noun} in {line.color}" for line in lines)
    listed = Question("List the text by place.", f"Of the text {layout}, on a {background} background.", (), "list")
    return Scene("text", image, caption, regions, text_questions(rng, lines, background), [describe(caption), listed])


def draw_line(rng: Random, image: Image.Image, line: Line, height: float) -> list[Region]:
    """Prints one line around the middle of the image, at `height` (0 top to 1 bottom), give or take three pixels.

    Returns the regions of what is read in one go: a word, or each digit of a number.
    """
    x = image.size[0] / 2 + rng.randint(-3, 3)
    y = image.size[1] * height + rng.randint(-3, 3)
    font, fill = ImageFont.load_default(size=FONT_SIZE), tint(rng, line.color)
    draw = ImageDraw.Draw(image)
    draw.text((x, y), line.text, fill=fill, font=font, anchor="mm", stroke_width=1, stroke_fill=fill)
    left, top, right, bottom = draw.textbbox((x, y), line.text, font=font, anchor="mm")
    units = list(line.text) if line.noun == "number" else [line.text]
    width = (right - left) / len(units)
    edges = [left + index * width for index in range(len(units))]
    return [((edge, top, edge + width, bottom), [unit, line.color, line.place]) for edge, unit in zip(edges, units)]


def text_questions(rng: Random, lines: list[Line], background: str) -> list[Question]:
    colors = list(COLORS)
    reading = " ".join(line.text for line in lines)
    read = ["Read the text.", "What does the text say?"]
    pool = [" ".join(random_text(rng, line) for line in lines) for _ in range(3)] + [reading]
    questions = [
        ask(rng, "read", read, reading, pool),
        ask(rng, "color", ["What color is the background?"], background, list(BACKGROUNDS)),
    ]
    nouns = [line.noun for line in lines]
    for noun in ("word", "number"):
        count = [f"How many {noun}s are there?", f"How many {noun}s are printed?"]
        questions.append(ask(rng, "count", count, str(nouns.count(noun)), COUNTS))
    for line in lines:
        pool = [random_text(rng, line) for _ in range(3)] + [line.text]
        if len(lines) > 1:
            at = [f"What is printed at the {line.place}?", f"Read the text at the {line.place}."]
            questions.append(ask(rng, "read", at, line.text, pool))
            color_at = [f"What color is the text at the {line.place}?"]
            questions.append(ask(rng, "color", color_at, line.color, colors))
            shade = [f"What is printed in {line.color}?"]
            questions.append(ask(rng, "read", shade, line.text, pool))
        if nouns.count(line.noun) == 1:
            what = [f"What {line.noun} is printed?", f"Which {line.noun} is printed?"]
            questions.append(ask(rng, "read", what, line.text, pool))
            color = [f"What color is the {line.noun}?", f"Which color is the {line.noun}?"]
            questions.append(ask(rng, "color", color, line.color, colors))
            where = [f"Where is the {line.noun}?"]
            questions.append(ask(rng, "where", where, line.place, ["top", "center", "bottom"]))
    return questions


def random_text(rng: Random, line: Line) -> str:
    """Another text of the same kind, to stand among the options."""
    others = [word for word in WORDS if word != line.text]
    return rng.choice(others) if line.noun == "word" else str((int(line.text) - 10 + rng.randint(1, 89)) % 90 + 10)


# ---- bar charts ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    color: str
    value: int


def make_bars(rng: Random, size: tuple[int, int]) -> Scene:
    """Three or four bars of different colours and values from 1 to 9, the value printed under each."""
    n = rng.randint(3, 4)
    bars = [Bar(*bar) for bar in zip(rng.sample(list(COLORS), n), rng.sample(range(1, 10), n))]
    background = rng.choice(list(BACKGROUNDS))
    image = Image.new("RGB", size, BACKGROUNDS[background])
    regions = draw_bars(rng, image, bars)
    ranked = sorted(bars, key=lambda bar: bar.value)
    items = join([f"{bar.color} {bar.value}" for bar in bars])
    ends = f"The tallest is {ranked[-1].color}, the shortest is {ranked[0].color}."
    caption = f"A bar chart with {n} bars: {items}. {ends}"
    items = ", ".join(f"the {order} is {bar.color} with {bar.value}" for order, bar in zip(ORDERS, bars))
    listed = Question("List the bars from left to right.", f"Of {n} bars {items}.", (), "list")
    return Scene("bars", image, caption, regions, bar_questions(rng, bars, ranked), [describe(caption), listed])


def draw_bars(rng: Random, image: Image.Image, bars: list[Bar]) -> list[Region]:
    """Bars on a base line, each one's value printed under it. Returns the region of each bar with its value."""
    width, height = image.size
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=VALUE_SIZE)
    base, slot = height - 28, width / len(bars)
    unit = (base - 4) / 9
    half = slot * rng.uniform(0.26, 0.4)
    regions = []
    for index, bar in enumerate(bars):
        x, top = slot * (index + 0.5), base - bar.value * unit
        draw.rectangle([x - half, top, x + half, base], fill=tint(rng, bar.color))
        draw.text((x, height - 13), str(bar.value), fill=(0, 0, 0), font=font, anchor="mm")
        regions.append(((x - half, top, x + half, height), [str(bar.value), bar.color, ORDERS[index]]))
    draw.line([2, base, width - 2, base], fill=(0, 0, 0), width=2)
    return regions


def bar_questions(rng: Random, bars: list[Bar], ranked: list[Bar]) -> list[Question]:
    colors, digits = [bar.color for bar in bars], [str(value) for value in range(1, 10)]
    orders = ORDERS[: len(bars)]
    tall = ["Which bar is tallest?", "Which bar is the tallest?", "What color is the tallest bar?"]
    short = ["Which bar is shortest?", "Which bar is the shortest?", "What color is the shortest bar?"]
    one, other = rng.sample(bars, 2)
    taller = [f"Which bar is taller, {one.color} or {other.color}?"]
    picked = rng.choice(bars)
    above = str(len(bars) - 1 - ranked.index(picked))
    questions = [
        ask(rng, "bar", tall, ranked[-1].color, colors),
        ask(rng, "bar", short, ranked[0].color, colors),
        ask(rng, "bar", taller, max(one, other, key=lambda bar: bar.value).color, [one.color, other.color]),
        ask(rng, "count", ["How many bars are there?"], str(len(bars)), ["2", "3", "4", "5"]),
        ask(rng, "count", [f"How many bars are taller than the {picked.color} bar?"], above, COUNTS[:4]),
    ]
    for order, bar in zip(orders, bars):
        value = [f"What is the value of the {bar.color} bar?", f"How tall is the {bar.color} bar?"]
        where = [f"Where is the {bar.color} bar?", f"Which bar from the left is {bar.color}?"]
        questions += [
            ask(rng, "read", value, str(bar.value), digits),
            ask(rng, "color", [f"What color is the {order} bar?"], bar.color, list(COLORS)),
            ask(rng, "where", where, order, orders),
        ]
    return questions
