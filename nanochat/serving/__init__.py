"""A trained checkpoint to something that people and programs talk to: OpenAI's API and a chat page. No Ray.

`app.create_app(backend, config)` is the whole endpoint, over anything that turns ids into ids (`backend.py`).
"""
