"""An ordinary script for OpenAI's API: nothing in it knows of any other server.

Where that is, the ``openai`` package takes from the environment: OPENAI_BASE_URL.
"""

import openai

client = openai.OpenAI()
model = next(iter(client.models.list())).id
stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Tell me a story about a kite."}],
    max_tokens=60,
    temperature=0,
    stream=True,
)
for chunk in stream:
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)
print()
