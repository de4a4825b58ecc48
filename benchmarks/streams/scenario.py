"""The three scenarios (van de Ven & Tolias 2019)."""

TASK, DOMAIN, CLASS = SCENARIOS = ("task", "domain", "class")
"""What is known when a prediction is made, and what is asked: the task is given and its classes are told apart, by a
head of its own; the task is not given and need not be found; or all classes met so far are told apart."""
