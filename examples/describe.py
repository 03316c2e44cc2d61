"""Use from Python: load a model and its draft, describe an image as the text comes, and ask a follow-up question."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli import DEFAULT_CHECKPOINT, DEFAULT_DRAFT

from generate import DEFAULT_IMAGE, answer, load, reply_message

engine, tokenizer = load(DEFAULT_CHECKPOINT, draft=DEFAULT_DRAFT)
options = {"draft": engine.draft, "show": lambda text, ids: print(text, end="", flush=True)}

image = {"type": "image", "path": str(DEFAULT_IMAGE)}
messages = [{"role": "user", "content": [image, {"type": "text", "text": "Describe the image."}]}]
first = answer(engine, tokenizer, {"messages": messages}, **options)
print()

# The reply goes back by its own ids, so that the KV cache is continued.
messages += [reply_message(tokenizer, first["token_ids"]), {"role": "user", "content": "What is the value of red?"}]
answer(engine, tokenizer, {"messages": messages}, **options)
print()
