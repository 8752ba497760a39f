"""What the Hub would refuse in a card is refused here, with its line."""

from pathlib import Path

import pytest

from hf_llama3.errors import UserError
from hf_llama3.model_card.front_matter import check_card, read_front_matter, split_card, write_front_matter

GOOD = "license: mit\ntags:\n- a\nlanguage: en\nbase_model:\n- owner/name\ndatasets: plain\nanything: else\n"


def card(front_matter):
    return f"---\n{front_matter}---\n# Title\n\n---\nrest\n"


def test_what_is_right():
    value = read_front_matter(card(GOOD), Path("README.md"))
    assert value["license"] == "mit" and value["anything"] == "else"
    check_card(card(GOOD), Path("README.md"))
    check_card(card("license: other\nlicense_name: my-terms\nlicense_link: LICENSE\n"), Path("README.md"))
    assert split_card(write_front_matter(value) + "rest") == (write_front_matter(value)[4:-4], "rest")


@pytest.mark.parametrize(
    ("front_matter", "message"),
    [
        (
            "tags:\n- a\nlicense: apache2\n",
            "line 4: `license` must be an identifier of the Hub's list.*, got 'apache2'",
        ),
        ("license: [mit, yours]\n", "line 2: `license` must be .*, got 'yours'"),
        ("license: mit\ntags: [1]\n", "line 3: `tags` must be a text, got 1"),
        ("license: mit\nlanguage: no\n", "line 3: `language` must be a code such as en, got False"),
        ("license: mit\nlanguage: english\n", "line 3: `language` must be a code"),
        ("license: mit\nbase_model: /models/mine\n", "line 3: `base_model` must be a repository"),
        ("license: mit\nbase_model_relation: converted\n", "line 3: `base_model_relation` must be one of adapter"),
        ("license: mit\npipeline_tag: Text Generation\n", "line 3: `pipeline_tag` must be a task"),
        ("license: other\n", "line 2: `license: other` needs `license_name`"),
        ("license: mit\nlicense: mit\n", "line 3: `license` stands in line 2 already"),
        ("license: mit\ntags: [a\n", "line 4: .*; mend the YAML there"),
        ("license: mit\nlanguage: &a [&b [*a, *b]]\n", "line 3: a value must stand where it is meant, got a reference"),
        (
            "license: mit\nrun: " + ":".join(["59"] * 9000) + "\n",
            "line 3: a number must have at most 40 digits, got 26999",
        ),
        ("license: mit\na: {<<: {b: &c 1}, d: *c}\n", "line 3: a value must stand where it is meant"),
        ("license: mit\na: " + "x" * 2**17, "must have front matter of at most 131072 characters"),
        ("- license\n", "line 2: front matter must be keys with values, got list"),
        ("tags:\n- a\n", "has no `license` in its front matter"),
        ("", "has no `license` in its front matter"),
    ],
)
def test_what_is_wrong(front_matter, message):
    with pytest.raises(UserError, match=rf"^README\.md.*{message}"):
        check_card(card(front_matter), Path("README.md"))


def test_no_front_matter():
    assert split_card("# Title\n---\na: b\n---\n")[0] is None
    with pytest.raises(UserError, match="has no `license`"):
        check_card("# Title\n", Path("README.md"))
