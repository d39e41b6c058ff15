"""Word problems with their equations, for tests."""

NAMES = ["Ann", "Bo", "Cy"]


def problems(count):
    """Rows of two steps."""
    for i in range(count):
        a, b, c = 3 + i % 7, 2 + i % 5, 1 + i % 4
        text = f"{NAMES[i % 3]} has {a} bags of {b} eggs and eats {c} eggs. How many are left?"
        yield {"problem": text, "answer": str(a * b - c), "equation": "- * number0 number1 number2"}


def simple(count):
    """Rows of one step, every other with a number too many."""
    for i in range(count):
        text = f"{NAMES[i % 3]} has {9 + i} eggs and eats {1 + i % 4}" + (", says one of 7 men." if i % 2 else ".")
        yield {"problem": text, "answer": str(8 + i - i % 4), "equation": "- number0 number1"}
