"""Draw the plan of the rooms and the shapes of the model, as SVG.

python docs/pictures/plans.py
"""

from pathlib import Path
from xml.sax.saxutils import escape

IMAGES = Path(__file__).parent.parent / "images"
BLUE, GREEN, ORANGE, GREY = "#dbe7fb", "#dcf1df", "#fdeccd", "#eceef2"

# The rooms from the top; each row stands on those below it.
ROOMS = [
    [("cli", "a module for each group of commands", GREY), ("quickstart, doctor", "the main job; what is here", GREY)],
    [
        ("training", "from a text to a model", GREEN),
        ("measure", "loss and speed", GREEN),
        ("model_card", "the card, the upload", GREEN),
    ],
    [("text", "load by what lies in a folder; prompts, chat", BLUE)],
    [
        ("cpu", "optimize, restore, kernels, 8 and 4 bits", BLUE),
        ("distributed", "several processes and devices", BLUE),
    ],
    [("conversion", "one table of names, shapes and shards; plan, write, verify", ORANGE)],
    [("the six model files", "what a Hub repository carries", BLUE), ("files", "whole folders, JSON, hashes", GREY)],
]

# The way of the tokens: shape, what is done, and where it stands.
SHAPES = [
    ("(B, T)", "token ids", "tokenizer", GREY),
    ("(B, T, E)", "embedding: one row of E channels a token", "modeling_llama3.py", BLUE),
    ("(B, T, E)", "RMSNorm", "norm.py", GREEN),
    ("(B, H, T, D)  (B, K, T, D) x 2", "queries; keys and values, fewer: K heads of D", "attention.py", ORANGE),
    ("the same", "queries and keys turned by their position", "rotary.py", ORANGE),
    ("(B, H, T, S)", "every query against the keys before it, softmax", "attention.py", ORANGE),
    ("(B, T, E)", "values added up, projected, added to the stream", "attention.py", ORANGE),
    ("(B, T, E)", "RMSNorm", "norm.py", GREEN),
    ("(B, T, F) x 2 to (B, T, E)", "silu(gate) * up, down, added to the stream", "mlp.py", GREEN),
    ("(B, T, E)", "last RMSNorm, after all layers", "norm.py", BLUE),
    ("(B, T, V)", "logits: one number a token of the vocabulary", "modeling_llama3.py", BLUE),
]
LAYER = (2, 8)  # the rows of SHAPES that are one decoder layer
LEGEND = (
    "B batch, T tokens, S tokens seen, E hidden size, H query heads, K key/value heads, D head size, F feed-forward, "
    "V vocabulary"
)


def main():
    IMAGES.mkdir(exist_ok=True)
    (IMAGES / "rooms.svg").write_text(rooms(), "utf-8")
    (IMAGES / "shapes.svg").write_text(shapes(), "utf-8")


def rooms() -> str:
    width, height, gap, parts = 860, 62, 14, []
    for number, row in enumerate(ROOMS):
        each = (width - 2 * 20 - gap * (len(row) - 1)) / len(row)
        for place, (name, purpose, colour) in enumerate(row):
            left, top = 20 + place * (each + gap), 20 + number * (height + gap)
            parts += box(left, top, each, height, colour)
            parts.append(text(left + each / 2, top + 26, name, bold=True, middle=True))
            parts.append(text(left + each / 2, top + 46, purpose, size=12, middle=True))
    bottom = 20 + len(ROOMS) * (height + gap)
    parts.append(text(width / 2, bottom + 12, "Imports run downwards, from a room to those below it.", 12, middle=True))
    return picture(width, bottom + 32, parts, "The rooms of the package: each imports only from those below it")


def shapes() -> str:
    width, height, gap, parts = 860, 34, 8, []
    top_of = [20 + number * (height + gap) for number in range(len(SHAPES))]
    first, last = LAYER
    parts += box(10, top_of[first] - 5, width - 20, top_of[last] + height + 10 - top_of[first], "none", dashed=True)
    for (shape, done, where, colour), top in zip(SHAPES, top_of, strict=True):
        parts += box(20, top, 250, height, colour)
        parts.append(text(145, top + 22, shape, mono=True, middle=True, size=13))
        parts.append(text(290, top + 22, done, size=13.5))
        parts.append(text(width - 24, top + 22, where, mono=True, size=12, end=True))
    bottom = top_of[-1] + height
    parts.append(text(20, bottom + 22, "Dashed: a decoder layer, of which the 8B has 32.", 12))
    parts.append(text(20, bottom + 40, LEGEND, 12))
    return picture(width, bottom + 54, parts, "The shapes of Llama 3 from token ids to logits")


def box(left, top, width, height, colour, dashed=False) -> list[str]:
    line = 'stroke-dasharray="5 4"' if dashed else ""
    return [
        f'<rect x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}" rx="6" fill="{colour}" '
        f'stroke="#7b8494" {line}/>'
    ]


def text(left, top, words, size=15.0, bold=False, mono=False, middle=False, end=False) -> str:
    font = "ui-monospace, Menlo, Consolas, monospace" if mono else "system-ui, Helvetica, Arial, sans-serif"
    anchor = "middle" if middle else "end" if end else "start"
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{left:g}" y="{top:g}" font-family="{font}" font-size="{size:g}" fill="#1c2333" '
        f'text-anchor="{anchor}"{weight}>{escape(words)}</text>'
    )


def picture(width, height, parts, title) -> str:
    """Put the parts on a white ground, so that they can be read on a dark page as well."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img">'
    ground = f'<rect width="{width:g}" height="{height:g}" rx="8" fill="#ffffff"/>'
    return "\n".join([head, f"<title>{escape(title)}</title>", ground, *parts, "</svg>", ""])


if __name__ == "__main__":
    main()
