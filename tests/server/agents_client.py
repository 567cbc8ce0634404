"""A client of its own environment: an agent of ``openai-agents`` calls a tool and answers.

python agents_client.py http://127.0.0.1:8000/v1
"""

import asyncio
import sys
from typing import Any, Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel, ConfigDict

called: list[str] = []


class Sound(BaseModel):
    model_config = ConfigDict(extra="forbid")

    animal: Literal["cow", "bee"]
    loud: bool


@function_tool
def sound(animal: Literal["cow", "bee"]) -> str:
    """Return the sound of an animal."""
    called.append(animal)
    return "moo"


async def main(url: str) -> None:
    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
    for kind in (OpenAIResponsesModel, OpenAIChatCompletionsModel):
        settings = ModelSettings(temperature=0, max_tokens=200, tool_choice="required")
        common: dict[str, Any] = {"model": kind("tiny", client), "model_settings": settings}
        agent = Agent(name="farmer", instructions="Be brief.", tools=[sound], **common)
        # After the forced call the choice is free again, and the model answers.
        found = await Runner.run(agent, "What does the cow say?", max_turns=4)
        assert called.pop() in ("cow", "bee") and isinstance(found.final_output, str)
        streamed = Runner.run_streamed(agent, "What does the cow say?", max_turns=4)
        kinds = {event.type async for event in streamed.stream_events()}
        assert called.pop() and {"raw_response_event", "run_item_stream_event"} <= kinds
        more = [*found.to_input_list(), {"role": "user", "content": "And the bee?"}]
        typed = Agent(name="typed", output_type=Sound, model=kind("tiny", client))
        assert isinstance((await Runner.run(typed, more)).final_output, Sound)
        print(kind.__name__, "calls a tool, streams, goes on and answers with a model")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
