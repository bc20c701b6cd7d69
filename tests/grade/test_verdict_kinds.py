r"""Pairs by the kind of their answer, right and wrong, each graded from both sides. Where notation leaves a choice they rest on
these rules: a percent sign may be left out or meant as a value; a missing unit is forgiven and a different one is not; a bare
list is a set, a tuple is not; a decimal of four significant digits may be the exact value rounded; a number word multiplies."""

import pytest

from kit.grade.extract import extract_answer
from kit.grade.verdict import equal, gold_answer, grade

# kind: lines of "gold  ~  prediction" that are right, and lines that are wrong
RIGHT = {
    "fractions": r"""
        \frac{7}{8} ~ $\boxed{\dfrac{7}{8}}$
        \frac{7}{8} ~ \boxed{\tfrac78}
        -\frac{3}{5} ~ \boxed{\frac{-3}{5}}
        -\frac{3}{5} ~ \boxed{\frac{3}{-5}}
        -\frac{3}{5} ~ \boxed{-0.6}
        0.125 ~ 1/8
        0.5 ~ .5
        3.0 ~ 3
        \frac{a}{b} ~ \boxed{a/b}
        \frac{\frac{1}{2}}{3} ~ \boxed{\frac16}
        \frac{1}{2} ~ \boxed{\displaystyle\frac{1}{2}}
        \frac{1}{2} ~ \boxed{\frac{1}{2}\,}
        \frac{17}{2} ~ \boxed{\frac{17}{2} = 8.5}
        \frac{2x}{3} ~ \boxed{\frac{2}{3}x}
        5\frac32 ~ 7.5
        \frac12\frac13 ~ \frac16
        \frac123 ~ \frac{3}{2}
        \frac{19}{3} ~ \boxed{\frac{19}{3}\approx 6.33}
        \frac{1}{2} ~ {1 \over 2}
        \frac{3}{4} ~ \nicefrac34
        0,05 ~ \frac{1}{20}
    """,
    "mixed numbers": r"""
        2\frac{3}{4} ~ \boxed{\frac{11}{4}}
        2\frac{3}{4} ~ \boxed{2.75}
        -1\frac{1}{2} ~ \boxed{-1.5}
        2 3/4 ~ \boxed{2\tfrac{3}{4}}
        5\frac12\text{ hours} ~ \boxed{5.5}
    """,
    "repeating decimals": r"""
        0.\overline{142857} ~ \boxed{\frac17}
        0.1\overline{6} ~ \boxed{1/6}
        \frac{1}{6} ~ \boxed{0.1\bar{6}}
        0.\overline{9} ~ 1
        2.\overline{3} ~ \boxed{\frac{7}{3}}
        0.(3) ~ 1/3
        0.1(6) ~ \frac16
        0.\dot{1}4285\dot{7} ~ \frac17
        0.333... ~ 1/3
        0.1666\ldots ~ \frac16
        3.14... ~ 3.14
    """,
    "signs": r"""
        -7 ~ \boxed{−7}
        -7 ~ –7
        x-1 ~ x − 1
        -7 ~ \boxed{-\,7}
        7 ~ \boxed{+7}
        -\frac{\pi}{2} ~ −π/2
    """,
    "thousands": r"""
        1234567 ~ 1,234,567
        1,234,567 ~ \boxed{1\,234\,567}
        12,345 ~ \boxed{12{,}345}
        1000000 ~ \boxed{10^6}
        1,000,000 ~ \boxed{1 000 000}
        123,456 ~ \boxed{123456.0}
        9! ~ \boxed{362,880}
        6,005 ~ \boxed{6\!,\!005}
        10,\!000 ~ \boxed{10000}
        1'234'567 ~ 1234567
        1.000.000 ~ 1000000
        1.000.000,50 ~ 1000000.5
        1~234 ~ 1234
    """,
    "money": r"""
        \$1,250.50 ~ 1250.5
        \$1{,}250 ~ \boxed{\$1250.00}
        \$18 ~ \boxed{18}
        18 ~ She makes $18 every day at the market, which is all she makes.
        18 ~ \boxed{18\text{ dollars}}
        £20 ~ 20
        \$0.75 ~ \boxed{\frac{3}{4}}
        \$42 ~ \boxed{42\text{ dollars}}
        €15 ~ \boxed{15\text{ euros}}
        \text{\$}32 ~ \boxed{32}
        £20 ~ \boxed{20\text{ pounds}}
        50¢ ~ \boxed{50\text{ cents}}
        \$12 ~ USD 12
        \$9.99 ~ $9.99
        \$-20 ~ -\$20
        \$2\frac{1}{2} ~ 2.50
        \$40\text{ per hour} ~ \boxed{40}
        70 ~ Le coût final est donc de 70 $.
    """,
    "percent": r"""
        25% ~ \boxed{25\%}
        25\% ~ \boxed{\frac14}
        25\% ~ \boxed{0.25}
        25\% ~ \boxed{25}
        12.5\% ~ \boxed{12\frac12\%}
        \frac{1}{4} ~ \boxed{25\%}
        33\frac{1}{3}\% ~ \boxed{\frac{100}{3}\%}
        5\% ~ \boxed{5\text{ percent}}
        5\% ~ \boxed{5\,\%}
        100 ~ The answer is 100%.
    """,
    "degrees": r"""
        45^\circ ~ \boxed{45}
        45^\circ ~ \boxed{45°}
        45^\circ ~ \boxed{45\text{ degrees}}
        45^{\circ} ~ \boxed{\frac{\pi}{4}}
        72\degree ~ \boxed{72^\circ}
        \angle ABC = 60^\circ ~ \boxed{60^\circ}
        22.5^\circ ~ \boxed{\frac{45}{2}^\circ}
        120^\circ ~ \boxed{120^{\circ}}
    """,
    "units": r"""
        12\text{ cm} ~ \boxed{12}
        12 ~ \boxed{12\text{ cm}}
        12\text{ cm}^2 ~ \boxed{12\,\mathrm{cm}^2}
        12\text{ m/s} ~ \boxed{12\ \text{meters per second}}
        3\text{ hours} ~ \boxed{3\text{ h}}
        36\text{ square feet} ~ \boxed{36\text{ ft}^2}
        20 mph ~ 20\text{ miles per hour}
        8\pi\text{ cm} ~ \boxed{8\pi}
        6\text{ units}^3 ~ \boxed{6}
        2\sqrt{3}\text{ inches} ~ \boxed{2\sqrt3}
        5\text{ mL} ~ \boxed{5\text{ ml}}
        100\text{ meters} ~ So the race is $\boxed{100\text{ m}}$ long.
        7\text{ apples} ~ \boxed{7}
        5^\circ\text{C} ~ \boxed{5}
        1.5\text{ km/h} ~ \boxed{1.5}
        \text{60 cm} ~ 60
        60 ~ \boxed{\text{60 cm}}
        60\text{ cm} ~ 60 \mathrm{~cm}
        2\text{ pounds} ~ 2\text{ lbs}
        24\pi\text{ cubic inches} ~ \boxed{24\pi \text{ in}^3}
        5 \mathrm{~m} / \mathrm{s} ~ \boxed{5}
        20 \mathrm{~km} / \mathrm{h} ~ \boxed{20\text{ km/h}}
        9.8\,\mathrm{m/s^2} ~ 9.8
        5 m/s ~ 5\ \frac{\text{m}}{\text{s}}
        60\text{ mph} ~ 60\text{ miles per hour}
        1000.99 m² ~ 1000.99
        5 m ~ 5m
        50\ \mathrm{J} ~ 50\text{ J}
        10\text{ units} ~ 10\text{ cm}
        5 ~ \boxed{5\text{ men}}
        3 ~ \boxed{3个}
        5 ~ The answer is 5 men.
    """,
    "equations": r"""
        x=7 ~ 7
        7 ~ x = 7
        y = \frac{1}{2}x - 3 ~ \boxed{2y = x - 6}
        y=3x ~ \boxed{3x}
        f(x)=2x^2 ~ \boxed{2x^2}
        n \equiv 3 \pmod 7 ~ \boxed{n \equiv 3 \pmod{7}}
        x=1,\ y=-1 ~ \boxed{(1,-1)}
        x=1, y=-1 ~ \boxed{y=-1, x=1}
        (x,y)=(1,-1) ~ \boxed{x=1,\ y=-1}
        AB = 5 ~ \boxed{5}
        P(A)=\frac{1}{3} ~ \boxed{\frac13}
        x^2+y^2=25 ~ \boxed{x^2+y^2-25=0}
        (x-1)^2+(y+2)^2=9 ~ \boxed{x^2-2x+y^2+4y-4=0}
        y=x^2-4x+4 ~ \boxed{y=(x-2)^2}
        S = \frac{\pi}{4} ~ \boxed{\frac{\pi}{4}}
        x = 3 ~ \boxed{3 = x}
        3x + 4y = 12 ~ \boxed{y = 3 - \frac{3}{4}x}
        \frac{x^2}{9}+\frac{y^2}{4}=1 ~ \boxed{4x^2+9y^2=36}
        f(x) = 3x+1 ~ y = 3x+1
        5 ~ x := 5
        x \equiv 2 \pmod 5 ~ x \equiv 7 (mod 5)
        \frac{\pi}{3}+2k\pi ~ \frac{\pi}{3}+2n\pi
    """,
    "plus or minus": r"""
        \pm 5 ~ \boxed{5,-5}
        \pm 5 ~ \boxed{x=\pm5}
        x = \pm\sqrt{3} ~ \boxed{\sqrt3, -\sqrt3}
        2\pm i ~ \boxed{2+i, 2-i}
        \frac{1\pm\sqrt5}{2} ~ \boxed{\frac{1+\sqrt5}{2}, \frac{1-\sqrt5}{2}}
        ±4 ~ \boxed{\{-4,4\}}
        \mp 3 ~ \pm 3
        -2, 0, 2 ~ \boxed{0, \pm2}
    """,
    "radicals": r"""
        \sqrt{50} ~ \boxed{5\sqrt{2}}
        \frac{1}{\sqrt2} ~ \boxed{\frac{\sqrt2}{2}}
        \sqrt[3]{54} ~ \boxed{3\sqrt[3]{2}}
        \sqrt[4]{16} ~ 2
        \sqrt{3+2\sqrt2} ~ \boxed{1+\sqrt2}
        \sqrt 7 ~ \boxed{7^{1/2}}
        √8 ~ 2√2
        \sqrt{2} ~ 1.4142
        3^{\frac{3}{2}} ~ 3\sqrt3
        \sqrt{12} ~ sqrt(12)
        2\sqrt{3} ~ 2*sqrt(3)
        \frac{\sqrt{6}}{3} ~ \boxed{\sqrt{\frac{2}{3}}}
    """,
    "logarithms": r"""
        \log_3 81 ~ 4
        \ln e^3 ~ 3
        \log 1000 ~ \boxed{3\log 10}
        \frac{\ln 3}{\ln 2} ~ \boxed{\log_2 3}
        2\ln 5 ~ \boxed{\ln 25}
        \ln 2+\ln 3 ~ \boxed{\ln 6}
        \log_{10} 2 ~ 0.3010
        \lg 2 ~ \log_{10} 2
        e^{2\ln 3} ~ 9
        \ln\left(\frac{3}{2}\right) ~ \ln 3 - \ln 2
    """,
    "scientific notation": r"""
        3.2\times10^5 ~ \boxed{320000}
        3.2\times10^5 ~ \boxed{3.2 \cdot 10^{5}}
        3.2\times 10^{-4} ~ \boxed{0.00032}
        6.02e23 ~ 6.02 \times 10^{23}
        1.5E3 ~ 1500
        4\times 10^{3} ~ 4,000
        10^{-2} ~ 0.01
        2.5 × 10⁴ ~ 25000
    """,
    "bases": r"""
        1101_2 ~ \boxed{13}
        1101_2 ~ \boxed{1101_{2}}
        1A_{16} ~ \boxed{26}
        210_3 ~ \boxed{21}
        43_5 ~ \boxed{23_{10}}
        110_{\text{two}} ~ 6
        1101_2 ~ 1101₂
        31 ~ 0x1F
        0xff ~ FF_{16}
        255 ~ \texttt{0xFF}
        0b1011 ~ 1011_2
        0o17 ~ 15
        (1101)_2 ~ 13
        26 ~ \text{1A}_{16}
        1101_{(2)} ~ 13
        1101 \text{ (base 2)} ~ 1101_2
        3 ~ 0x+3
    """,
    "intervals": r"""
        [2,5] ~ \boxed{2\le x\le5}
        (2,5) ~ \boxed{2<x<5}
        [2,\infty) ~ \boxed{x\ge2}
        (-\infty,3)\cup(5,\infty) ~ \boxed{x<3 \text{ or } x>5}
        (-\infty,3)\cup(5,\infty) ~ \boxed{(5,\infty)\cup(-\infty,3)}
        x\in(-1,4] ~ \boxed{(-1,4]}
        \left[\frac12,3\right) ~ \boxed{[0.5,3)}
        (-\infty,+\infty) ~ \boxed{\mathbb{R}}
        (-\infty, 2) \cup (2, \infty) ~ \boxed{\mathbb{R}\setminus\{2\}}
        (-\infty, 2) \cup (2, \infty) ~ \boxed{x\neq2}
        [-3,3] ~ \boxed{|x|\le3}
        -1<x<1 ~ \boxed{|x|<1}
        x<4 ~ \boxed{4>x}
        [1,3]\cup\{5\} ~ \boxed{\{5\}\cup[1,3]}
        a \ge 1 ~ [1, \infty)
        2 < a < 3 ~ a \in (2,3)
        0<x\leq 2 ~ \boxed{(0,2]}
        (0, \infty) ~ \boxed{x > 0}
        (-\infty,\infty) ~ \boxed{\text{all real numbers}}
        (1,2)\cup(3,4) ~ 1<x<2 \text{ or } 3<x<4
        x \leq -1 \text{ or } x \geq 4 ~ \boxed{(-\infty,-1]\cup[4,\infty)}
        [\sqrt{2}, 3) ~ \boxed{\sqrt{2} \leqslant x < 3}
        (-3,2) ~ \boxed{x > -3 \text{ and } x < 2}
        (0,1) ~ ]0,1[
        [0,+\infty) ~ [0,+\infty[
        (-\infty, 5] ~ ]-\infty; 5]
        \{x \in \mathbb{R} : x > 3\} ~ (3,\infty)
        \{x : x > 1, x \ne 2\} ~ (1,2)\cup(2,\infty)
        \left\{x \left\lvert\, x>2\right.\right\} ~ (2,\infty)
        x \neq 1, 2 ~ \mathbb{R}\setminus\{1,2\}
        \mathbb{R}\setminus[0,1] ~ (-\infty,0)\cup(1,\infty)
        k \le 0 \lor k \ge 4 ~ (-\infty, 0] \cup [4, \infty)
        (0,\infty) ~ \mathbb{R}^+
    """,
    "lists and sets": r"""
        1, 2, 3 ~ \boxed{3, 1, 2}
        1, 2, 3 ~ \boxed{\{1,2,3\}}
        \{1,2\} ~ \boxed{\{2,1\}}
        2 \text{ and } 3 ~ \boxed{2,3}
        x=2 \text{ or } x=3 ~ \boxed{3, 2}
        2, 3 ~ \boxed{x = 2, x = 3}
        \emptyset ~ \boxed{\varnothing}
        \frac12, -3 ~ \boxed{-3, 0.5}
        \{x: x>3\} ~ (3,\infty)
        1,2,3 ~ 1;2;3
        \{(1,2),(3,4)\} ~ \boxed{(3,4),(1,2)}
        \{-1,1\} ~ \boxed{\pm 1}
        \{2, 4, 6\} ~ \boxed{\left\{ 2, 4, 6 \right\}}
        -5, 1, 4 ~ \boxed{-5, 1, \text{ and } 4}
        \{x \mid x < 2\} ~ \boxed{(-\infty, 2)}
        2, 3, 5 ~ \boxed{2,~3,~5}
        \{2k : k \in \mathbb{Z}\} ~ \{2k \mid k \in \mathbb{Z}\}
        \emptyset ~ \text{no real solutions}
        \mathbb{Z} ~ \text{all integers}
        \{(x,y) : x+y=1\} ~ \{(x,y) \mid y+x=1\}
    """,
    "tuples": r"""
        (3,4) ~ \boxed{\left(3,4\right)}
        (1,-2,0) ~ \boxed{( 1, -2, 0 )}
        (0.5, 2) ~ \boxed{(\frac12, 2)}
        (6,31,-1) ~ 6,31,-1
        (\sqrt{2}, \pi) ~ \boxed{(\sqrt2,\pi)}
        \left( -\frac{1}{2}, \frac{\sqrt{3}}{2} \right) ~ (-0.5, \sqrt{3}/2)
        (a,b)=(2,3) ~ a=2,b=3
        (r,\theta)=(2,\pi) ~ (2, \pi)
        (1,2) ~ \boxed{\big(1,2\big)}
        (3,4) ~ \boxed{(x, y) = (3, 4)}
        P(3,4) ~ (3,4)
        A(1,2), B(3,4) ~ (1,2),(3,4)
        (3, 5) ~ \boxed{(3, 5) \text{ only}}
    """,
    "vectors and matrices": r"""
        \begin{pmatrix}1&2\\3&4\end{pmatrix} ~ \boxed{\begin{bmatrix}1&2\\3&4\end{bmatrix}}
        \begin{bmatrix}2&0\\0&2\end{bmatrix} ~ 2\begin{bmatrix}1&0\\0&1\end{bmatrix}
        \begin{pmatrix}1/2&0\\0&1\end{pmatrix} ~ \begin{pmatrix}0.5&0\\0&1\end{pmatrix}
        \left[\begin{array}{c}1\\2\end{array}\right] ~ (1,2)
        \begin{pmatrix}1\\2\end{pmatrix} ~ \boxed{\langle 1, 2\rangle}
        \begin{pmatrix}-1\\0\\5\end{pmatrix} ~ \boxed{\begin{pmatrix} -1 \\ 0 \\ 5 \end{pmatrix}}
        \begin{pmatrix}\frac{1}{2}\\-3\end{pmatrix} ~ \boxed{\begin{pmatrix}\dfrac12\\[2mm]-3\end{pmatrix}}
        \begin{pmatrix}a&b\\c&d\end{pmatrix} ~ \begin{pmatrix} a & b \\ c & d \\ \end{pmatrix}
    """,
    "complex numbers": r"""
        2+3i ~ \boxed{3i+2}
        -i ~ \boxed{-1i}
        i^2 ~ -1
        e^{i\pi/2} ~ i
        \frac{1}{1+i} ~ \boxed{\frac{1-i}{2}}
        \sqrt{-9} ~ 3i
        |3+4i| ~ 5
        \cos\frac{\pi}{3}+i\sin\frac{\pi}{3} ~ \frac{1}{2}+\frac{\sqrt3}{2}i
        (1+i)^4 ~ -4
        1+2i ~ \boxed{1 + 2\mathrm{i}}
        z = 1 - i ~ \boxed{1-i}
    """,
    "polynomials and quotients": r"""
        x^2-5x+6 ~ \boxed{(x-2)(x-3)}
        (x+1)(x-1)(x^2+1) ~ x^4-1
        3x+6 ~ 3(x+2)
        2x^2y ~ 2yx^2
        a^3+b^3 ~ (a+b)(a^2-ab+b^2)
        -x^2+1 ~ 1-x^2
        \frac{x^2-4}{x-2} ~ x+2
        x(x-1)(x-2) ~ x^3-3x^2+2x
        n^2+n ~ n(n+1)
        2a+2b ~ 2(b+a)
        \frac{1}{x}+\frac{1}{y} ~ \frac{x+y}{xy}
        x^{-2} ~ \frac{1}{x^2}
        x^2 + 2x ~ x² + 2x
        \frac{3x+1}{2} ~ 1.5x+0.5
        p(x) = x^2 - 1 ~ \boxed{(x-1)(x+1)}
        4x^2 ~ (2x)^2
    """,
    "trigonometry": r"""
        \sin(\pi/6) ~ 1/2
        \tan 45^\circ ~ 1
        \sin 2\theta ~ 2\sin\theta\cos\theta
        \cos^2 x - \sin^2 x ~ \cos 2x
        \arctan 1 ~ \frac{\pi}{4}
        \tan^{-1}(1) ~ \pi/4
        \cos(x) ~ \cos x
        \frac{\sin x}{\cos x} ~ \tan x
    """,
    "words": r"""
        \text{Yes} ~ \boxed{yes}
        \text{east} ~ \boxed{\text{East}}
        \text{no solution} ~ \boxed{\text{No solution}}
        \text{neither} ~ \boxed{\text{Neither}}
        \text{Wednesday} ~ The answer is Wednesday.
        \text{Alice} ~ \boxed{\mathrm{Alice}}
        \text{True} ~ \boxed{\textbf{True}}
        does not exist ~ \boxed{\text{does not exist}}
        \text{Thursday} ~ \boxed{\text{Thursday.}}
        \text{No} ~ \boxed{No}
        \text{odd} ~ The answer is **odd**.
        \text{Yes} ~ Yes, it is.
        \text{Yes} ~ **Yes**
        \text{True} ~ The statement is true.
        \text{Friday} ~ The day is Friday.
        \text{да} ~ \boxed{\text{Да}}
    """,
    "choices": r"""
        B ~ \boxed{\text{(B)}}
        B ~ The answer is (B).
        (B) ~ \boxed{B}
        D ~ **D**
        C ~ \boxed{\textbf{(C)}\ 12}
        C ~ Answer: C. 12 apples
        \textbf{(E)}\ 5 ~ \boxed{E}
        \textbf{(E)}\ 5 ~ \boxed{5}
        \text{(A)} ~ \boxed{\text{A}}
        B ~ The correct choice is (B), since 7 is prime.
        C ~ \boxed{\text{Option C}}
        C ~ The answer is **C. Mercury**
        D ~ Therefore the correct answer is option D.
        D ~ Therefore the correct answer is option D because 7 is prime.
        A ~ I choose option A because the others are too small.
        B ~ Option B is correct.
        C ~ I would go with C.
        C ~ I'd pick option (C), as 5 > 3.
        D ~ D is the correct answer.
        A ~ The answer would be A.
        B ~ Looking at the options, B is the only one that works.
        B ~ Thus, option B is the correct choice because A and C fail.
        C ~ Answer C
        B ~ 故选B。
        B ~ 选项B是正确的。
        C ~ La respuesta correcta es C.
        C ~ Die Antwort lautet C.
        D ~ Правильный ответ: D
        C ~ 정답은 C입니다.
        B ~ I think it's B
    """,
    "clocks and ratios": r"""
        3:45 ~ \boxed{3:45}
        3:45\text{ p.m.} ~ \boxed{3:45\text{ PM}}
        10\text{ a.m.} ~ \boxed{10\text{ AM}}
        3:45\text{ p.m.} ~ \boxed{3:45}
        6:4 ~ 3:2
        2:3 ~ \boxed{\frac23}
        \text{July 4} ~ \boxed{\text{July 4}}
        \text{March 3, 2010} ~ \boxed{\text{March 3, 2010}}
        4:30 ~ 4:30 p.m.
        4:30\text{ p.m.} ~ 4:30 PM
        1:2 ~ \boxed{1 : 2}
        5:3 ~ \boxed{5\text{ to }3}
    """,
    "where the answer stands": r"""
        12 ~ We have $\boxed{\boxed{12}}$.
        12 ~ \boxed{12} is the answer because 3 \cdot 4 = 12, and 5 is not.
        12 ~ First \boxed{10}. Wait, that is wrong. So \boxed{12}.
        12 ~ The answer is 12.
        12 ~ Therefore, there are 12 ways to do so.
        12 ~ <think>maybe 11</think> The answer is \boxed{12}
        12 ~ $\boxed{x = 12}$
        42 ~ **Final Answer:** 42
        42 ~ Final answer: $42$. I hope this helps!
        7 ~ so there are 7 of them #### 7
        3 ~ Thus the answer is \(3\).
        3 ~ The answer is $\frac{6}{2} = 3$.
        25 ~ So we have $5^2 = \boxed{25}$ square meters.
        8 ~ \[ \boxed{8} \]
        8 ~ $$\boxed{8.}$$
        8 ~ \boxed{8}. \boxed{}
        \frac{1}{2} ~ \boxed{\text{The answer is } \frac{1}{2}}
        2 ~ Let $x$ be the number we want. We get $x=2$
        6 ~ Hence $n = 2 \cdot 3 = 6$.
        \frac{1}{2} ~ The answer is \frac{1}{2}.
        \frac{1}{2} ~ The answer is: \(\frac{1}{2}\)
        5 ~ \boxed{\approx 5}
        5 ~ \boxed{= 5}
        10 ~ Thus, the answer is $10$, not $12$.
        1,3 ~ The answer is $x = 1$ and $x = 3$.
        -4 ~ so the minimum value is $-4$, as claimed.
        9 ~ The final answer is: $\boxed{9}$
        1/3 ~ The probability is 1/3.
        15 ~ \boxed{\$15}
        16 ~ My answer is 16 because 4 squared is 16 and 5 squared is 25.
        7 ~ The answer is the sum of 3 and 4, which is 7.
        6 ~ 答案是6，不是5。
        16 ~ The answer is sixteen, i.e. $16$.
        25\pi ~ So the area of the circle is 25π.
        2\sqrt{3} ~ The length is 2√3.
        2+3i ~ so z = 2 + 3i.
        x>3 ~ So we need x > 3.
        3:2 ~ The ratio is 3:2.
        12 ~ الجواب ١٢
    """,
    "wrappings": r"""
        \text{7} ~ 7
        7 ~ \boxed{\mathbf{7}}
        7 ~ \boxed{\text{ 7 }}
        x ~ \boxed{\mathit{x}}
        7 ~ \boxed{\displaystyle 7}
        7 ~ \boxed{7\;\!}
        7 ~ \boxed{~7}
        7 ~ \boxed{\,7\ }
        7 ~ \boxed{7\quad}
        7 ~ \boxed{(7)}
        7 ~ \boxed{{7}}
        7 ~ \boxed{$7$}
        7 ~ \boxed{\underline{7}}
        7 ~ \boxed{\color{red}{7}}
        7 ~ \boxed{\textcolor{red}{7}}
    """,
    "counting and powers": r"""
        \binom{5}{2} ~ 10
        5! ~ 120
        \sum_{k=1}^{4}k ~ 10
        \frac{10!}{3!7!} ~ 120
        {10 \choose 3} ~ 120
        \dbinom{6}{3} ~ 20
        2^{10} ~ 1024
        7^{2}\cdot 3 ~ 147
        \lceil 2.1\rceil ~ 3
        2^{-3} ~ 0.125
        2^5\cdot 3^2 ~ 288
        {}_5C_2 ~ \binom{5}{2}
        10 ~ ^5C_2
        5C2 ~ \binom52
        _{10}C_{3} ~ 120
        120 ~ {}_{10}\mathrm{C}_3
        C_{10}^{3} ~ 120
        {}_5P_2 ~ 20
        {}_nC_2 ~ \frac{n(n-1)}{2}
        \frac{{}_5C_2}{{}_4C_1} ~ \frac52
        C(5,2) ~ 10
        x^5C_2 ~ x^5 C_2
        C_1^2 ~ (C_1)^2
        7 ~ \boxed{7 \mod 11}
        5 \bmod 3 ~ 2
    """,
    "infinity and rounding": r"""
        \infty ~ \boxed{+\infty}
        \infty ~ infinity
        -\infty ~ \boxed{-\infty}
        3.14159 ~ \boxed{\pi}
        2.718 ~ \boxed{e}
        0.6667 ~ 2/3
        12.35 ~ 12.350
    """,
    "number words": r"""
        1000000 ~ \boxed{1\text{ million}}
        2.5 billion ~ \boxed{2.5\times10^9}
        2{,}500{,}000 ~ 2.5 million
        \$3 million ~ \boxed{\$3{,}000{,}000}
        7\text{ million dollars} ~ 7000000
        \frac{1}{2}\text{ million} ~ 500000
        3 hundred thousand ~ 300{,}000
        5000000 ~ The population is 5 million people.
        5000000 ~ So 5 million of them voted.
    """,
    "lists in prose": r"""
        1, 3, 5 ~ The solutions are 1, 3 and 5.
        1, 3, 5 ~ The solutions are $1$, $3$ and $5$.
        -2, 2 ~ Hence x = 2 or x = -2.
        -2, 2 ~ Hence $x = 2$ or $x = -2$.
        2,4,8 ~ Thus, the possible values of $n$ are 2, 4, and 8.
        \{1, 2\} ~ The solution set is {1, 2}.
        (2, -1) ~ It follows that the vertex is at (2, -1).
        (1,2),(2,1) ~ The solutions are (1, 2) and (2, 1).
        [2,5] ~ The solution is [2, 5].
        x=1, y=2 ~ The solution is x = 1 and y = 2.
        \frac{3}{4} ~ So the probability is 3/4 or 75%.
        12 ~ The sides are 3, 4, 5, so the perimeter is 12.
        5 ~ We get a = 3, b = 4, c = 5.
        20 ~ Each side is 5, 5 * 4 = 20
    """,
}
WRONG = {
    "fractions": r"""
        \frac{3}{5} ~ \boxed{\frac{5}{3}}
        \frac{22}{7} ~ \boxed{\pi}
        \frac{1}{3} ~ \boxed{0.33}
        \frac{a}{b} ~ \boxed{b/a}
        \frac{1}{2} ~ \boxed{12}
        \frac{3}{4} ~ \boxed{3}
        0.5 ~ 0,05
        {1 \over 2} ~ 2
        \nicefrac{1}{2} ~ 12
        6, 05 ~ 6.05
    """,
    "mixed numbers": r"""
        2\frac{3}{4} ~ \boxed{\frac{6}{4}}
        -1\frac{1}{2} ~ \boxed{-\frac12}
        2\frac{3}{4} ~ \boxed{23/4}
        11/2 ~ \boxed{1  1/2}
        12 ~ \boxed{$1$ $2$}
    """,
    "signs": r"""
        7 ~ \boxed{−7}
        -x ~ x
        -\frac12 ~ \frac12
    """,
    "thousands": r"""
        123,456 ~ \boxed{123,457}
        1,234 ~ \boxed{1}
        1000 ~ \boxed{100}
        1'234 ~ 1'235
        1.000.000 ~ 1
    """,
    "money": r"""
        \$20 ~ \boxed{\$2}
        \$3.50 ~ \boxed{\$3.05}
        \$5 ~ 5 cents
        \$5 ~ \boxed{€5}
        \$5 ~ 5¢
        £20 ~ \boxed{20\text{ euros}}
        $\$12$ ~ 12\text{ euros}
        \$9.99 ~ 9.99 cents
        $$5 ~ 5 cents
        \$20 ~ -\$20
    """,
    "percent": r"""
        25\% ~ \boxed{0.025}
        5\% ~ \boxed{6\%}
        25\% ~ \boxed{0.25\%}
    """,
    "degrees": r"""
        45^\circ ~ \boxed{54^\circ}
        45^\circ ~ \boxed{\frac{\pi}{3}}
    """,
    "units": r"""
        12\text{ km} ~ \boxed{12\text{ miles}}
        5\text{ kg} ~ \boxed{5000\text{ kg}}
        3\text{ hours} ~ \boxed{3\text{ minutes}}
        12\text{ cm} ~ \boxed{13\text{ cm}}
        7\text{ feet } 6\text{ inches} ~ 7\text{ feet }5\text{ inches}
        \text{60 cm} ~ 60\text{ miles}
        5\text{ m/s} ~ 5\text{ km/h}
        60\text{ mph} ~ 60\text{ km/h}
        5^\circ\text{C} ~ 5^\circ\text{F}
        5\ \mathrm{m} ~ 5\ \mathrm{s}
        5m ~ 5
        2 m ~ 3m
        2\mathrm{i} ~ 2
        192 ~ \boxed{193公斤}
    """,
    "equations": r"""
        x=7 ~ \boxed{y=7}
        x=7 ~ \boxed{x=-7}
        y=3x ~ \boxed{y=3x+1}
        n \equiv 3 \pmod 7 ~ \boxed{n \equiv 4 \pmod{7}}
        x=1,y=-1 ~ \boxed{x=-1,y=1}
        a+b=7 ~ \boxed{7}
        x^2+y^2=25 ~ \boxed{x^2+y^2=5}
        f(x)=2x^2 ~ \boxed{x^2}
        f(2) = 3 ~ f(3) = 2
        f(x) = 3x+1 ~ y = 3x-1
        x \equiv 2 \pmod 5 ~ x \equiv 3 \pmod 5
        x \equiv 2 \pmod 5 ~ x \equiv 2 \pmod 7
        \frac{\pi}{3}+2k\pi ~ \frac{\pi}{3}+n\pi
    """,
    "plus or minus": r"""
        \pm 5 ~ \boxed{5}
        2\pm i ~ \boxed{2+i}
        5 ~ \boxed{\pm 5}
        \pm 2 ~ \boxed{\pm 3}
    """,
    "radicals": r"""
        5\sqrt2 ~ \boxed{\sqrt{52}}
        \sqrt2 ~ 1.42
        2\sqrt{3} ~ \sqrt{23}
        \sqrt[3]{2} ~ \sqrt{2}
        \sqrt{2}+\sqrt{3} ~ \sqrt{5}
    """,
    "logarithms": r"""
        \log_2 3 ~ \boxed{\log_3 2}
        \ln 6 ~ \boxed{\ln 5}
        \ln 2 ~ \log_{10} 2
    """,
    "scientific notation": r"""
        3.2\times10^5 ~ \boxed{3.2\times10^4}
        3.2\times10^5 ~ \boxed{3.2}
        6.02\times10^{23} ~ 6.02\times10^{-23}
    """,
    "bases": r"""
        101_2 ~ 101_3
        1101_2 ~ \boxed{1101}
        1101_2 ~ \boxed{1011_2}
        0x1F ~ 0
        0x1F ~ 0x2F
        10x1 ~ 16
        (1101)_2 ~ 1101
        1101 \text{ (base 2)} ~ 1101 \text{ (base 3)}
        0b1111 ~ 1111
    """,
    "intervals": r"""
        (2,5) ~ \boxed{2\le x<5}
        [2,\infty) ~ \boxed{x>2}
        (-\infty,3)\cup(5,\infty) ~ \boxed{(3,5)}
        [0,1] ~ \boxed{[0,1)}
        x<4 ~ \boxed{x\le4}
        x<4 ~ \boxed{x>4}
        (2,5) ~ [2,5]
        (0,\infty) ~ (-\infty,0)
        x \ge 3 ~ 3
        (1,2) ~ \boxed{x > 1 \text{ and } y < 2}
        -1<x<1 ~ |y|<1
        \mathbb{R} ~ \text{all integers}
        (0,1) ~ [0,1[
        ]0,1[ ~ [0,1]
        \{x \vert x > 2\} ~ (3, \infty)
        \{x : x > 1, x \ne 2\} ~ \{x : x > 1\}
        x \neq 1, 2 ~ \mathbb{R}\setminus\{1,3\}
        \{x \in \mathbb{Z} : 1 \le x \le 3\} ~ [1,3]
        \mathbb{R}^+ ~ \mathbb{R}
    """,
    "lists and sets": r"""
        1,2,3 ~ \boxed{1,2}
        \{1,2\} ~ \boxed{\{1,2,3\}}
        \emptyset ~ \boxed{0}
        (1,2),(3,4) ~ \boxed{(2,1),(4,3)}
        2,3 ~ \boxed{2}
        3 ~ \boxed{2, 3}
        \{3k : k \in \mathbb{Z}\} ~ \{2k : k \in \mathbb{Z}\}
        \text{no solution} ~ \boxed{\text{one solution}}
    """,
    "tuples": r"""
        (3,4) ~ \boxed{(4,3)}
        (3,4) ~ \boxed{[3,4]}
        (1,2) ~ \boxed{(1,2,3)}
        (0,0) ~ 0
        (1,-1) ~ \boxed{(1,1)}
        P(2,3) ~ Q(2,3)
        P(2,3) ~ (3,2)
        A(1,2), B(3,4) ~ A(3,4), B(1,2)
    """,
    "vectors and matrices": r"""
        \begin{pmatrix}1&2\\3&4\end{pmatrix} ~ \begin{pmatrix}1&3\\2&4\end{pmatrix}
        \begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix}2\\1\end{pmatrix}
        \begin{pmatrix}1\\2\end{pmatrix} ~ \boxed{\langle 2, 1\rangle}
    """,
    "complex numbers": r"""
        2+3i ~ \boxed{2-3i}
        3i ~ 3
        2+3i ~ \boxed{5i}
    """,
    "polynomials and quotients": r"""
        x^2-5x+6 ~ \boxed{(x-2)(x+3)}
        x^2-5x+6 ~ x^2-5x+6=0
        x+1 ~ y+1
        5x^3 ~ 5x^2
        (x+2)^2 ~ x^2+4
        2x ~ 2
        x(x+1) ~ x^2+1
    """,
    "trigonometry": r"""
        \sin x ~ \cos x
        \sin 30^\circ ~ \frac{\sqrt3}{2}
        \sin x ~ \sin 2x
    """,
    "words": r"""
        \text{Yes} ~ \boxed{\text{No}}
        \text{parabola} ~ \boxed{\text{hyperbola}}
        \text{True} ~ \boxed{False}
        \text{Alice} ~ \boxed{\text{Bob}}
        \text{no solution} ~ \boxed{0}
        \text{even} ~ \boxed{\text{uneven}}
        \text{Yes} ~ No, it is not.
        \text{True} ~ The statement is false.
        \text{C} ~ \text{c}
    """,
    "choices": r"""
        B ~ \boxed{C}
        (B) ~ \boxed{\text{(D)}}
        C ~ \boxed{\text{Option D}}
        \textbf{(E)}\ 5 ~ \boxed{6}
        A ~ I choose option B because A is too small.
        A ~ Option A is wrong, so I choose B.
        B ~ I would go with C rather than B.
        A ~ I choose option A or B.
        C ~ Option C is incorrect.
        A ~ A number is even if it ends in 2, so I go with B.
        C ~ Neither C nor D works, so the answer is B.
        B ~ B is wrong, so C.
        A ~ Not A.
        A ~ Since 3 is odd it is surely not option A here.
        D ~ 故选B。
    """,
    "clocks and ratios": r"""
        3:45 ~ \boxed{3:54}
        3:45\text{ a.m.} ~ \boxed{3:45\text{ p.m.}}
        2:30\text{ p.m.} ~ 1:15 p.m.
        1:2:3 ~ 1:2:4
        \text{July 4} ~ \boxed{\text{July 5}}
        2:3 ~ 3:2
        \text{March 3, 2010} ~ \boxed{\text{March 3, 2011}}
    """,
    "where the answer stands": r"""
        10 ~ First \boxed{10}. Wait, that is wrong. So \boxed{12}.
        11 ~ <think>maybe \boxed{11}</think> The answer is \boxed{12}
        14 ~ so Tom has 14 apples and Jerry has 9
        12 ~ The answer is not 12 but 13.
        5 ~ I do not know the answer to this question, I am sorry.
        6 ~ \boxed{2} \cdot 3 = 6
        5 ~ 答案是6，不是5。
        25\pi ~ So the area of the circle is 25.
        x>3 ~ So we need x >= 3.
        3:2 ~ The ratio is 2:3.
    """,
    "counting and powers": r"""
        2^{10} ~ 1000
        5! ~ 5
        \binom{5}{2} ~ \frac52
        2^{3} ~ 23
        {}_5C_2 ~ {}_5P_2
        ^5C_2 ~ 25
        C_{10}^3 ~ 1000
        {}_2C_5 ~ 10
        5C2 ~ 52
        C_1^2 ~ 2
    """,
    "infinity and rounding": r"""
        \infty ~ \boxed{-\infty}
        3.14 ~ \boxed{\pi}
        1.4 ~ 1.41
        \infty ~ \boxed{0}
    """,
    "number words": r"""
        1 million ~ 1
        1 million ~ 1 billion
        2.5 million ~ 2500
        \$3 million ~ \$3
        5 million ~ The population is 5.
    """,
    "repeating decimals": r"""
        0.(6) ~ 1/3
        0.(3) ~ 0.3
        0.333... ~ 0.334
    """,
    "lists in prose": r"""
        5 ~ The solutions are 1, 3 and 5.
        1, 3, 5 ~ The solutions are 1 and 3.
        1, 3 ~ The solutions are 1, 3 and 5.
        2 ~ Hence x = 2 or x = -2.
        (3,4) ~ So the point is (4, 3).
        2,3 ~ There are 2 boys and 3 girls, so 5 children.
    """,
}


def pairs(table):
    return [
        (kind, *(side.strip() for side in line.split(" ~ ")))
        for kind, lines in table.items()
        for line in lines.strip().splitlines()
    ]


@pytest.mark.parametrize(
    ("gold", "prediction", "verdict"),
    [pytest.param(gold, prediction, verdict, id=f"{kind}: {gold} ~ {prediction}")
     for table, verdict in ((RIGHT, "correct"), (WRONG, "wrong")) for kind, gold, prediction in pairs(table)],
)  # fmt: skip
def test_pair_from_both_sides(gold, prediction, verdict):
    found = grade(gold, prediction, deadline=30)
    assert found.verdict == verdict, found
    reference = gold_answer(gold)
    answer, _ = extract_answer(prediction, choice=gold.strip("()")[:1] in "ABCDE" and len(gold) < 4)
    if answer is not None:
        assert equal(reference, answer, deadline=30) == equal(answer, reference, deadline=30)


def test_there_are_two_hundred_of_each_sort_and_no_pair_stands_twice():
    listed = pairs(RIGHT) + pairs(WRONG)
    assert len(listed) >= 300
    assert len({(gold, prediction) for _, gold, prediction in listed}) == len(listed)
