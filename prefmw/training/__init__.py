"""The offline trainers and what they train on. So far: the topics that the embedded chat model is to answer about."""

from prefmw.training.topics import Fact, Graded, Topic, load_topics

__all__ = ["Fact", "Graded", "Topic", "load_topics"]
