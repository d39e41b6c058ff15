r"""Pairs of reference and boxed answer with the label that docs/verifiers.md promises, in classes.

`CASES`: class -> list of (reference, content of the box, same?). Written by hand for this project.
"""
# ruff: noqa: E501, RUF001

CASES: dict[str, list[tuple[str, str, bool]]] = {
    "integer": [
        ("42", "42", True), ("42", "43", False), ("-7", "-7", True), ("7", "-7", False), ("7", "+7", True), ("7", "007", True),
        ("0", "-0", True), ("123456789012345678901234567890", "123456789012345678901234567890", True),
        ("123456789012345678901234567890", "123456789012345678901234567891", False), ("12", "21", False), ("1", "l", False),
    ],
    "thousands": [
        ("12345", "12,345", True), ("12,345", "12345", True), ("12345", r"12\,345", True), ("12345", "12{,}345", True),
        ("12345", "12 345", True), ("1234567", "1,234,567", True), ("12345", "12,346", False), ("617", "1,234/2", True),
    ],
    "decimal": [
        ("2.5", "2.50", True), ("2.5", "2.5", True), ("0.5", ".5", True), ("42", "42.", True), ("42", "42.0", True),
        ("2.5", "2.51", False), ("0.0000012", "0.0000008", False), ("3.14", "3.1400001", False), ("0.1", "0.10000001", False),
    ],
    "scientific": [
        ("0.001", "1e-3", True), ("1500", r"1.5\times 10^{3}", True), ("1500", r"1.5 \cdot 10^3", True),
        ("0.0000001", "10^{-7}", True), ("0.0000002", "10^{-7}", False), ("1500", r"1.5\times 10^{4}", False), ("1000", "10^3", True),
    ],
    "fraction": [
        (r"\frac{1}{2}", r"\frac{1}{2}", True), (r"\frac{1}{2}", "1/2", True), (r"\frac{1}{2}", r"\dfrac12", True),
        (r"\frac{1}{2}", r"\frac{2}{4}", True), (r"\frac{1}{2}", "0.5", True), (r"-\frac{1}{2}", r"\frac{-1}{2}", True),
        (r"-\frac{1}{2}", r"\frac{1}{-2}", True), (r"\frac{1}{2}", r"\frac{1}{3}", False), (r"\frac{1}{2}", r"-\frac{1}{2}", False),
        (r"\frac{3}{4}", "¾", True), (r"\frac{1}{2}", "½", True), ("2", r"\frac{4}{2}", True), (r"\frac{2}{3}", r"\frac{3}{2}", False),
    ],
    "rounded": [
        (r"\frac{1}{3}", "0.33", False), (r"\frac{1}{3}", "0.3333333", True), (r"\frac{1}{3}", "0.333", False),
        (r"\pi", "3.14", False), (r"\pi", "3.14159265", True), (r"\sqrt{2}", "1.41", False), (r"\sqrt{2}", "1.41421356", True),
        (r"\frac{1}{3}", "0.3334", False), (r"\frac{\pi}{1000000}", "0.000003", False),
    ],
    "mixed number": [
        (r"2\frac{1}{3}", r"\frac{7}{3}", True), (r"\frac{7}{3}", "2 1/3", True), (r"\frac{7}{3}", r"2\frac13", True),
        (r"-2\frac{1}{2}", "-2.5", True), (r"2\frac{1}{3}", r"\frac{2}{3}", False),
    ],
    "percent": [
        (r"50\%", "50", True), ("50", r"50\%", True), (r"50\%", r"50\%", True), ("0.5", r"50\%", True), (r"50\%", "0.5", True),
        (r"50\%", r"51\%", False), ("0.5", r"5\%", False), ("50", "0.5", False), (r"12.5\%", r"\frac{1}{8}", True),
    ],
    "currency": [
        ("18", r"\$18", True), (r"\$18", "18", True), ("18", "18 dollars", True), ("18.50", r"\$18.5", True),
        (r"\$18", r"18\text{ euros}", False), (r"\$1.50", r"150\text{ cents}", False), (r"\$18", r"\$19", False),
        ("1250", r"\$1,250", True),
    ],
    "unit": [
        ("5", r"5\text{ cm}", True), (r"5\text{ cm}", "5", True), (r"5\text{ cm}", r"5\,\mathrm{cm}", True),
        (r"5\text{ cm}", "5 m", False), ("5 cm", "5 m", False), (r"5\text{ cm}^2", r"5\text{ cm}", False),
        (r"5\text{ cm}^2", r"5\text{ square centimeters}", True), (r"16\pi\text{ cm}^2", r"16\pi", True), ("12", r"12\text{ apples}", True),
        (r"12\text{ hours}", r"12\text{ hr}", True), ("60", r"60\text{ mph}", True), ("5", r"5\text{ million}", False), ("6", r"5\text{ cm}", False),
        (r"5\text{ cm}", r"50\text{ mm}", False),
    ],
    "degree": [
        ("30", r"30^\circ", True), (r"30^{\circ}", "30", True), ("30", "30°", True), (r"30^\circ", r"30\text{ degrees}", True),
        (r"30^\circ", r"60^\circ", False),
    ],
    "square root": [
        (r"2\sqrt{3}", r"\sqrt{12}", True), (r"\sqrt{2}", "√2", True), (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", True),
        (r"\sqrt{2}", r"\sqrt{3}", False), (r"3\sqrt[3]{2}", r"\sqrt[3]{54}", True), (r"1+\sqrt{2}", r"\sqrt{2}+1", True),
        (r"\sqrt2", r"2^{1/2}", True), (r"\sqrt{5}", "sqrt(5)", True),
    ],
    "pi": [
        (r"16\pi", r"16 \pi", True), (r"\pi", "pi", True), (r"\pi", "π", True), (r"16\pi", "16", False), (r"\frac{\pi}{2}", r"0.5\pi", True),
    ],
    "polynomial": [
        ("x^2+2x+1", "(x+1)^2", True), ("x^2", "x²", True), ("2x+3", "3+2x", True), ("2x+3", "2x-3", False), ("x", "X", False),
        ("x", "y", False), ("a+b", "b+a", True), ("6x^5", "6x^{5}", True),
    ],
    "rational function": [
        (r"\frac{x+1}{x}", r"1+\frac{1}{x}", True), (r"\frac{x^2-1}{x-1}", "x-1", False), (r"\frac{1}{x+1}", r"\frac{1}{x}+1", False),
    ],
    "trigonometry": [
        (r"\sin^2 x", r"1-\cos^2 x", True), (r"\tan\theta", r"\frac{\sin\theta}{\cos\theta}", True), (r"\sin x", r"\cos x", False),
        ("1", r"\sin\frac{\pi}{2}", True),
    ],
    "logarithm": [("3", r"\log_2 8", True), (r"\ln 4", r"2\ln 2", True), (r"\ln 4", r"\ln 5", False), ("2e", "e+e", True)],
    "complex": [("3+4i", "4i+3", True), ("3+4i", "3-4i", False), ("-1", "i^2", True), ("5i", "5", False)],
    "tuple": [
        ("(1,2)", "(1, 2)", True), ("(1,2)", "(2,1)", False), ("(1,2)", "1,2", True), (r"(\frac{1}{2},3)", "(0.5,3)", True),
        ("(1,2)", r"\{1,2\}", False), ("(1,2)", "(1,2,3)", False), (r"(3,\frac{\pi}{2})", r"\left(3,\frac{\pi}{2}\right)", True),
        ("(1,2)", "(1,3)", False), (r"(\sqrt{8},1)", r"(2\sqrt{2},1)", True), ("(1,2)", "(x,y)=(1,2)", True),
    ],
    "set": [
        (r"\{1,2\}", r"\{2,1\}", True), (r"\{1,2\}", "(1,2)", False), (r"\{1,2\}", "1,2", True), (r"\{1,2\}", r"\{1,2,3\}", False),
        (r"\{1,2\}", r"\{1,1,2\}", True), (r"\{1,2\}", r"\left\{1,2\right\}", True), (r"\{\frac12,2\}", r"\{2,0.5\}", True),
        (r"\emptyset", "∅", True), (r"\{1,2\}", r"\{1,3\}", False),
    ],
    "list": [
        ("1,2", "2,1", True), ("1,2", "1, 2", True), ("1,2", "(2,1)", False), ("1,2", "1", False), ("1", "1,2", False), ("1,2,3", "1,2,4", False),
        ("1,2", r"1 \text{ and } 2", True), ("1,2", r"x=1 \text{ or } x=2", True), (r"-\sqrt{2},\sqrt{2}", r"\sqrt{2},-\sqrt{2}", True),
        ("1,1,2", "1,2", False), ("(1,2),(3,4)", "(3,4),(1,2)", True), ("(1,2),(3,4)", "(2,1),(3,4)", False),
    ],
    "plus or minus": [
        ("2,-2", r"\pm 2", True), (r"\pm 2", "2,-2", True), (r"1\pm\sqrt{2}", r"1+\sqrt{2},1-\sqrt{2}", True), (r"\pm 2", "2", False),
        (r"\pm 2", r"\pm 3", False),
    ],
    "interval": [
        ("[0,1)", "[0, 1)", True), ("[0,1)", "(0,1)", False), ("[0,1]", "[0,1)", False), (r"(-\infty,2]", r"(-\infty, 2]", True),
        (r"(0,1)\cup(2,3)", r"(2,3)\cup(0,1)", True), (r"[\frac12,1]", "[0.5,1]", True), ("[0,1]", "[0,2]", False),
        (r"[0,\infty)", r"[0,+\infty)", True),
    ],
    "inequality": [
        (r"(-\infty,2]", r"x\le 2", True), (r"x\le 2", r"(-\infty,2]", True), (r"(0,1)", "0<x<1", True), ("x>2", "x<2", False),
        (r"x\ge 2", r"x \geq 2", True), (r"x\in[0,1]", "[0,1]", True), (r"(-\infty,2]", "x<2", False), ("x<2", "2>x", True),
    ],
    "equation": [
        ("y=2x+3", "2x+3", True), ("2x+3", "y=2x+3", True), ("5", "x=5", True), ("x=5", "5", True), ("x=5", "y=5", False),
        ("7", "8=7", False), ("5", "2+3=5", True), ("y=2x+3", "y=3+2x", True), ("y=2x+3", "y=2x-3", False), ("5", "5=5", True),
        ("x^2+y^2=4", "4", False), ("f(x)=x^2", "x^2", True), ("2x+3y=6", "4x+6y=12", True), ("2x+3y=6", "2x+3y=7", False),
    ],
    "choice": [
        ("B", "B", True), ("B", "(B)", True), ("B", r"\text{B}", True), ("B", r"\text{(B)}", True), (r"\text{(B)}", "B", True),
        ("B", "C", False), ("B", "B.", True), ("B", r"\textbf{(B) } 12", True), ("B", r"(C)\ 12", False), ("A", "D", False),
    ],
    "words": [
        (r"\text{even}", "even", True), (r"\text{even}", "Even", True), (r"\text{even}", "odd", False), ("yes", r"\text{Yes}", True),
        (r"\text{no}", "No", True), (r"\text{Tuesday}", r"\text{tuesday}", True), (r"\text{Tuesday}", r"\text{Monday}", False),
        ("ellipse", r"\text{an ellipse}", True), (r"\text{neither}", r"\text{neither.}", True),
    ],
    "base": [
        ("1010_2", "1010_2", True), ("1010_2", r"1010_{2}", True), ("10_2", "10", False), ("10", "10_2", False), ("5", "101_2", True),
        ("1010_2", "1010_3", False), (r"1010_{\text{two}}", "1010_2", True), ("2516_8", "2516_8", True),
    ],
    "mixed-up kinds": [
        ("-37", "-37_8", False), (r"125\%", r"125\text{ miles}", False), (r"17\%", r"17^\circ", False), (r"\text{A,B}", r"\text{B}", False),
        (r"\frac{1}{\sqrt{2}}", r"\frac{1}{\sqrt{2}}c", False), ("5", "5c", False), ("5", "5m", False), (r"\frac23", r"\dfrac23", True),
    ],
    "matrix": [
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", True),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", True),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}", False),
        (r"\begin{pmatrix}1/2\\3\end{pmatrix}", r"\begin{pmatrix}0.5\\3\end{pmatrix}", True),
    ],
    "typography": [
        ("-5", "−5", True), ("-5", "–5", True), ("42", "４２", True), ("42", "4\u200b2", True), ("42", "$42$", True), ("42", r"\(42\)", True),
        ("x+1", r"\displaystyle x+1", True), (r"2\times 3", "2×3", True), ("12", r"\textbf{12}", True), ("12", r"\,12\,", True),
        ("7", r"\text{The answer is }7", True), ("x_1", "x₁", True), ("12", r"12\!", True), ("1/2", "1⁄2", True),
    ],
    "infinity": [(r"\infty", "∞", True), (r"\infty", r"-\infty", False), (r"\infty", r"+\infty", True), ("0", r"\infty", False)],
    "factorial and binomial": [("120", "5!", True), ("10", r"\binom{5}{2}", True), ("10", r"\binom{5}{3}", True), ("120", "6!", False)],
    "power": [("8", "2^3", True), ("2^{10}", "1024", True), ("2^{10}", "2^{11}", False), ("x^{2y}", "(x^y)^2", True), (r"3^{100}", r"9^{50}", True)],
    "absolute value": [("3", "|-3|", True), ("|x-1|", "|1-x|", True), ("|x|", "x", False)],
    "ratio": [("3:4", "3:4", True), ("3:4", "3 : 4", True), ("3:4", "4:3", False)],
}  # fmt: skip

TEXTS: list[tuple[str, str, bool]] = [
    ("5", r"The answer is \boxed{5}.", True),
    ("5", r"The answer is \fbox{5}.", True),
    ("5", r"First \boxed{4}. On reflection, \boxed{5}.", True),
    ("5", r"First \boxed{5}. On reflection, \boxed{4}.", False),
    ("5", r"It is \boxed{5} or \boxed{6}.", False),
    ("6", r"It is \boxed{5} or \boxed{6}.", False),
    ("5,6", r"They are \boxed{5} and \boxed{6}.", True),
    ("5", r"So $\boxed{5}$, that is $\boxed{5}$.", True),
    ("5", "The answer is 5.", False),
    ("5", r"so \boxed{5", False),
    ("5", r"\boxed{5}. Let me check: \boxed{5", False),
    ("5", r"\boxed{}", False),
    ("5", "", False),
    (r"\frac{1}{2}", r"\boxed{\frac{1}{2}}", True),
    (r"\frac{1}{2}", r"\boxed{\frac{1}{2}", False),
    ("5", r"\boxed 5", True),
    ("5", r"\boxed{\boxed{5}}", True),
    (r"\{1\}", r"\boxed{\{1\}}", True),
    ("7", r"$x = 7", False),
    ("8", "First try: \\boxed{7}\nSecond try: \\boxed{8}", True),
    ("7", "First try: \\boxed{7}\nSecond try: \\boxed{8}", False),
    ("8", "The value is $\\boxed{8}$\nFinal Answer: The final answer is $\\boxed{8.0}$", True),
    (r"\frac{1}{2}", "The value is \\boxed{1/2}\nFinal answer: \\boxed{\\frac{1}{2}}", True),
    ("8", r"I try $\boxed{7}$, no: $$\boxed{8}$$", True),
    ("42", r"It is \boxed{41}, but I forgot one, so the answer is \boxed{42}", True),
    ("5,6", r"The roots are $x=\boxed{5}$, $y=\boxed{6}$.", True),
    ("5", r"The roots are $x=\boxed{5}$, $y=\boxed{6}$.", False),
    ("1,3", r"The least number is \(\boxed{1}\), and the largest number of such elements is \(\boxed{3}\).", True),
    ("5", r"It is \boxed{5} or maybe \boxed{6}", False),
    ("6", r"It is \boxed{5} or maybe \boxed{6}", False),
    ("5", r"<think>Is it \boxed{4}?</think> It is \boxed{5}", True),
    ("4", r"<think>Is it \boxed{4}?</think> It is 5", False),
    ("5", r"Is it \boxed{4}?</think> It is \boxed{5}", True),
    ("4", r"<think>It is \boxed{4}", False),
    ("4", r"\boxed{4} <think>Or not?", False),
    ("5", r"[THINK]\boxed{4}[/THINK]\boxed{5}", True),
]
"""Reference, completion, correct?"""

POLICY: list[tuple[str, list[str], list[str]]] = [
    ("12345", ["12,345", r"12\,345", "12{,}345", "12 345", "+12345", "12345.0"], ["12346"]),
    ("2.5", ["2.50", r"\frac52"], ["2.51", "2.5000001"]),
    (r"\frac12", ["1/2", "0.5", r"\frac24", "½"], [r"\frac13", "0.501"]),
    (r"\frac13", ["0.3333333"], ["0.333"]),
    (r"\pi", ["3.14159265"], ["3.14"]),
    ("1500", [r"1.5\times10^3", "1.5e3"], [r"1.5\times10^4"]),
    (r"\frac73", [r"2\frac13", "2 1/3"], [r"\frac23"]),
    (r"50\%", ["50", "0.5", r"\frac12"], [r"51\%", r"5\%"]),
    ("50", [r"50\%"], ["0.5"]),
    ("18", [r"\$18", r"18\text{ dollars}"], [r"\$19"]),
    (r"\$18", ["18"], [r"18\text{ euros}"]),
    (r"5\text{ cm}", ["5", r"5\mathrm{cm}", "5 centimeters"], [r"5\text{ m}", r"50\text{ mm}", r"5\text{ cm}^2"]),
    ("5 miles", ["5 mi", "5"], ["5 mph", "5 km"]),
    ("5 square units", ["5 square units", "5"], ["5 cubic units"]),
    ("5000000", [r"5\text{ million}"], []),
    ("5", [], [r"5\text{ million}"]),
    (r"30^\circ", ["30", "30°", r"30\text{ degrees}"], [r"60^\circ"]),
    ("1010_2", ["1010_{2}", r"1010_{\text{two}}"], ["1010", "10"]),
    ("10", ["1010_2"], ["10_2"]),
    ("(1,2)", ["(1, 2)", "1,2"], ["(2,1)", r"\{1,2\}"]),
    (r"\{1,2\}", [r"\{2,1\}", "2,1", r"\{1,1,2\}"], ["(1,2)", r"\{1\}"]),
    ("1,2", ["2,1", r"1 \text{ and } 2", r"x=1 \text{ or } x=2"], ["(2,1)", "1", "1,1,2"]),
    (r"\pm2", ["2,-2"], ["2"]),
    (r"(-\infty,2]", [r"x\le2", r"(-\infty, 2]"], ["x<2", r"(-\infty,2)"]),
    ("5", ["x=5"], []),
    ("x=5", ["5"], ["y=5"]),
    ("y=2x+3", ["2x+3", "y=3+2x"], ["2x-3"]),
    ("7", ["3+4=7"], ["8=7"]),
    ("x", ["x"], ["X", "y"]),
    ("B", ["(B)", r"\text{B.}", r"\textbf{(B)}\ 12"], ["C", "b"]),
    (r"\text{even}", ["Even", r"\text{even.}"], ["odd"]),
    ("3:4", ["3 : 4", "6:8"], ["4:3"]),
    ("-5", ["−5", "–5", "-５"], []),
    ("f(x)=x^2", ["x^2"], ["f(t)=t^2"]),
]
"""The rows of the table in docs/verifiers.md: reference, correct, wrong."""
