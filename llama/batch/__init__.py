"""A file of requests, in OpenAI's batch format: every line means what its POST to the server does.

https://platform.openai.com/docs/guides/batch
"""
