"""The offline trainers and what they train on.

The embedded chat model's corpus is data (``topic_files``, ``style_files``, ``talk_files``) that :mod:`composer` puts
together into chats; :mod:`sft` trains on them as a recipe says.
"""

from prefmw.training.topics import Fact, Graded, Topic, load_topics

__all__ = ["Fact", "Graded", "Topic", "load_topics"]
