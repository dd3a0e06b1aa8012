"""Orders of messages that OpenAI's API takes and the model does not know, through OpenAI's own client."""

import openai
import pytest
from serving import ScriptedEngine, answer_ids, serving

from nanochat_jax.serve.messages import OpenAIMessage, as_turns


def user(content) -> dict:
    return {"role": "user", "content": content}


def assistant(content, **fields) -> dict:
    return {"role": "assistant", "content": content} | fields


def system(content, role: str = "system") -> dict:
    return {"role": role, "content": content}


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
REFUSAL = [{"type": "refusal", "refusal": "No."}]
RESULT = [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]

# The messages of a request, and the turns that the model sees: user, assistant, user, ...
TAKEN = [
    ([user("a"), user("b")], ["a\n\nb"]),
    ([user("a"), user("b"), assistant("c"), assistant("d"), user("e")], ["a\n\nb", "c\n\nd", "e"]),
    ([assistant("Hello!"), user("a")], ["", "Hello!", "a"]),
    ([system("s"), assistant("Hello!"), user("a")], ["s", "Hello!", "a"]),
    ([system("s"), system("t"), user("a")], ["s\n\nt\n\na"]),
    ([system("s"), system("t", "developer"), user("a")], ["s\n\nt\n\na"]),
    ([user("a"), assistant("b"), system("s"), user("c")], ["a", "b", "s\n\nc"]),
    ([user("a"), system("s")], ["a\n\ns"]),
    ([user("a"), assistant("b"), system("s")], ["a", "b", "s"]),
    ([system("s")], ["s"]),
    ([user("a"), assistant(None), user("b")], ["a\n\nb"]),
    ([user("a"), {"role": "assistant"}, user("b")], ["a\n\nb"]),
    ([user("a"), assistant(None, tool_calls=[CALL], refusal=None), user("b")], ["a\n\nb"]),
    ([user("a"), assistant(None)], ["a"]),
    ([assistant(None), user("a")], ["a"]),
    ([user(""), user("a"), user("")], ["a"]),
    ([user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), user("c")], ["ab\n\nc"]),
    ([user("a"), assistant(REFUSAL), user("b")], ["a", "No.", "b"]),
    ([user("a"), assistant("b", name="me", audio=None, annotations=[]), user("c")], ["a", "b", "c"]),
]


@pytest.mark.parametrize(("messages", "expected"), TAKEN)
def test_turns(messages, expected):
    turns = as_turns([OpenAIMessage.model_validate(message) for message in messages])
    assert [turn["content"] for turn in turns] == expected
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"][: len(turns)]


def test_the_model_sees_what_it_was_trained_on(tokenizer):
    """A system message at the beginning gives the very tokens of training, and every order gives an answer."""
    answer = lambda _: answer_ids(tokenizer, "ok")  # noqa: E731
    engine = ScriptedEngine(tokenizer, answer)
    with serving(engine) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        ask = lambda messages: client.chat.completions.create(model=None, messages=messages)  # noqa: E731
        for messages, _ in TAKEN:
            assert ask(messages).choices[0].message.content == "ok"
        trained = [system("Be brief."), user("1+1?"), assistant([*RESULT, {"type": "text", "text": "2"}]), user("?")]
        ask(trained)
        ids = list(engine.requests[len(TAKEN)].ids)
        assert ids == tokenizer.render_for_completion({"messages": trained})
        ask([user("a"), assistant("b"), assistant(RESULT)])  # the parts of merged messages stay parts
        ids = list(engine.requests[len(TAKEN) + 1].ids)
        assert tokenizer.decode(ids).endswith("b\n\n<|python_start|>1+1<|python_end|><|output_start|>2<|output_end|>")
        assert ids.count(tokenizer.special("<|assistant_start|>")) == 1
