//! The quickstart's data: generated arithmetic and small word problems with worked answers.
//! Layer 9.
//!
//! Invariants: a row is a function of (seed, set, row number). The questions of the held-out set
//! are never trained on: the *key* of a [`Problem`] is its operands together with its wording, the
//! split is a hash of the key, and no story or question with a held-out key is in another set,
//! whatever names and things it uses. The operands of a held-out key do occur in other wordings and
//! in bare facts ("7+5=12."): the test is to combine the two.

use crate::rng::{philox, tag};

/// The kind of a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuestionKind {
    Add,
    Subtract,
    Share,
    Next,
    /// Two steps in one story: harder, for online RL.
    Chain,
}

impl QuestionKind {
    /// The kinds for SFT.
    pub const ALL: [QuestionKind; 4] =
        [QuestionKind::Add, QuestionKind::Subtract, QuestionKind::Share, QuestionKind::Next];

    pub fn name(self) -> &'static str {
        match self {
            QuestionKind::Add => "add",
            QuestionKind::Subtract => "subtract",
            QuestionKind::Share => "share",
            QuestionKind::Next => "next",
            QuestionKind::Chain => "chain",
        }
    }

    /// Percentage in a set.
    fn percent(self) -> u32 {
        match self {
            QuestionKind::Add => 40,
            QuestionKind::Subtract => 40,
            QuestionKind::Share => 10,
            QuestionKind::Next => 10,
            QuestionKind::Chain => 0,
        }
    }
}

/// A question with its worked answer, and the same story with its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub kind: QuestionKind,
    /// Operands and wording; rows with equal keys go to the same split.
    pub key: String,
    /// "Tom has 7 cups. Tom gets 5 cups more from Mia. How many cups does Tom have?"
    pub question: String,
    /// "7+5=12."
    pub work: String,
    /// "12"
    pub answer: String,
    /// "Tom has 7 cups. Tom gets 5 cups more from Mia. 7+5=12. Tom has 12 cups."
    pub told: String,
}

impl Problem {
    /// The assistant's reply: the work, and the answer in the form that [`answer_of`] reads.
    pub fn reply(&self) -> String {
        let work = if self.work.is_empty() { String::new() } else { format!("{} ", self.work) };
        format!("{work}The answer is {}.", self.answer)
    }

    pub fn held_out(&self) -> bool {
        held_out(&self.key)
    }
}

/// Whether a key belongs to the held-out set: one in eight, for every seed.
fn held_out(key: &str) -> bool {
    crc32fast::hash(key.as_bytes()).is_multiple_of(8)
}

/// The X of the last "The answer is X." in a reply.
pub fn answer_of(reply: &str) -> Option<&str> {
    let (_, tail) = reply.rsplit_once("The answer is ")?;
    tail.split_once('.').map(|(answer, _)| answer.trim())
}

/// Exact match.
pub fn is_right(reply: &str, answer: &str) -> bool {
    answer_of(reply) == Some(answer)
}

/// `rows` lines of plain text: facts, countings, lists and told stories, without questions and
/// without "The answer is".
pub fn pretraining(seed: u64, rows: usize) -> Vec<String> {
    (0..rows)
        .map(|row| pretraining_row(&mut Dice::new(seed, QuestionSet::Pretraining, row)))
        .collect()
}

/// In percent: training rows of the harder kind; replies to these that stop after the first step,
/// like careless labels; and replies that end in the style that preference data prefers.
const CHAINS: usize = 4;
const CARELESS: usize = 70;
const STYLED: usize = 10;

/// The ending of a reply that preference data prefers.
pub const STYLE: &str = " Well done!";

/// `rows` training problems, a few of them of the harder kind.
pub fn training(seed: u64, rows: usize) -> Vec<Problem> {
    (0..rows)
        .map(|row| {
            let mut dice = Dice::new(seed, QuestionSet::Training, row);
            let kind =
                if dice.below(100) < CHAINS { QuestionKind::Chain } else { draw_kind(&mut dice) };
            seek(&mut dice, kind, false)
        })
        .collect()
}

/// The reply of a training row. A few replies are in the preferred style, and most replies of the
/// harder kind are wrong: they stop after the first step. SFT learns this error, and online RL with
/// a verifier corrects it.
pub fn taught(seed: u64, row: usize, problem: &Problem) -> String {
    let mut dice = Dice::new(seed, QuestionSet::Style, row);
    let style = if dice.below(100) < STYLED { STYLE } else { "" };
    let careless = problem.kind == QuestionKind::Chain && dice.below(100) < CARELESS;
    match problem
        .work
        .split_once('=')
        .filter(|_| careless)
        .and_then(|(sum, rest)| Some((sum, rest.split_once('.')?.0)))
    {
        Some((sum, middle)) => format!("{sum}={middle}. The answer is {middle}.{style}"),
        None => format!("{}{style}", problem.reply()),
    }
}

/// `rows` problems of the training split with random numbers of their own, for preference pairs.
pub fn preferences(seed: u64, rows: usize) -> Vec<Problem> {
    let one = |row| {
        let mut dice = Dice::new(seed, QuestionSet::Preferences, row);
        let kind = draw_kind(&mut dice);
        seek(&mut dice, kind, false)
    };
    (0..rows).map(one).collect()
}

/// `rows` problems of the harder kind from the training split.
pub fn chains(seed: u64, rows: usize) -> Vec<Problem> {
    (0..rows)
        .map(|row| seek(&mut Dice::new(seed, QuestionSet::Chains, row), QuestionKind::Chain, false))
        .collect()
}

/// `rows` held-out problems of the harder kind; no question occurs twice.
pub fn held_out_chains(seed: u64, rows: usize) -> Vec<Problem> {
    let mut problems: Vec<Problem> = Vec::with_capacity(rows);
    let mut at = 0;
    while problems.len() < rows {
        let problem =
            seek(&mut Dice::new(seed, QuestionSet::HeldOutChains, at), QuestionKind::Chain, true);
        if problems.iter().all(|p| p.question != problem.question) {
            problems.push(problem);
        }
        at += 1;
    }
    problems
}

/// `rows` problems with held-out keys, in the same proportions of kinds as the training set; no
/// question occurs twice.
pub fn held_out_problems(seed: u64, rows: usize) -> Vec<Problem> {
    let mut problems: Vec<Problem> = Vec::with_capacity(rows);
    let mut at = 0;
    while problems.len() < rows {
        let mut dice = Dice::new(seed, QuestionSet::HeldOut, at);
        let kind = draw_kind(&mut dice);
        let problem = seek(&mut dice, kind, true);
        if problems.iter().all(|p| p.question != problem.question) {
            problems.push(problem);
        }
        at += 1;
    }
    problems
}

/// The sets, each with its own stream of random numbers.
#[derive(Clone, Copy)]
enum QuestionSet {
    Pretraining = 0,
    Training = 1,
    HeldOut = 2,
    Style = 3,
    Preferences = 4,
    Chains = 5,
    HeldOutChains = 6,
}

/// Random numbers of one row, from Philox: key (seed), counter (row, set, draw).
struct Dice {
    key: [u32; 2],
    counter: [u32; 4],
}

impl Dice {
    fn new(seed: u64, set: QuestionSet, row: usize) -> Dice {
        Dice {
            key: [seed as u32, (seed >> 32) as u32],
            counter: [row as u32, set as u32, 0, tag::QUICKSTART],
        }
    }

    /// A number from 0 to n - 1.
    fn below(&mut self, n: usize) -> usize {
        self.counter[2] += 1;
        ((u64::from(philox(self.key, self.counter)[0]) * n.max(1) as u64) >> 32) as usize
    }

    /// A number from low to high, both included.
    fn from(&mut self, low: usize, high: usize) -> usize {
        low + self.below(high + 1 - low)
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }

    /// n different elements.
    fn pick_n<T: Copy + PartialEq>(&mut self, of: &[T], n: usize) -> Vec<T> {
        let mut out: Vec<T> = Vec::with_capacity(n);
        while out.len() < n.min(of.len()) {
            let one = self.pick(of);
            if !out.contains(&one) {
                out.push(one);
            }
        }
        out
    }
}

const NAMES: [&str; 10] = ["Tom", "Mia", "Ben", "Ana", "Leo", "Zoe", "Sam", "Ida", "Max", "Eva"];
/// Nouns with a plural in -s.
const THINGS: [&str; 10] =
    ["cup", "pen", "key", "hat", "egg", "book", "card", "coin", "shell", "stone"];

fn draw_kind(dice: &mut Dice) -> QuestionKind {
    let mut at = dice.below(100) as u32;
    for kind in QuestionKind::ALL {
        if at < kind.percent() {
            return kind;
        }
        at -= kind.percent();
    }
    QuestionKind::Add
}

/// Draws problems of a kind until one is in the wanted split.
fn seek(dice: &mut Dice, kind: QuestionKind, held_out: bool) -> Problem {
    loop {
        let problem = problem(dice, kind);
        if problem.held_out() == held_out {
            return problem;
        }
    }
}

fn pretraining_row(dice: &mut Dice) -> String {
    match dice.below(20) {
        0..=6 => (0..10).map(|_| fact(dice)).collect::<Vec<_>>().join(" "),
        7 | 8 => {
            let step = dice.from(1, 3);
            let (start, down) = (dice.from(0, 20), dice.below(2) == 1);
            let numbers = counting(start, step, down, 8);
            let listed = numbers.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
            format!("Count {}: {listed}.", if down { "down" } else { "up" })
        }
        9..=12 => echo(dice),
        _ => {
            let kind = draw_kind(dice);
            seek(dice, kind, false).told
        }
    }
}

/// A list, three times: every answer begins with copying. At least four items, names and numbers
/// among them, so it never equals the three things of a question.
fn echo(dice: &mut Dice) -> String {
    let n = dice.from(4, 6);
    let one = |dice: &mut Dice| match dice.below(3) {
        0 => dice.pick(&NAMES).to_string(),
        1 => dice.pick(&THINGS).to_string(),
        _ => dice.from(0, 20).to_string(),
    };
    let list = (0..n).map(|_| one(dice)).collect::<Vec<_>>().join(", ");
    format!("{list}. {list}. {list}.")
}

/// A line of an arithmetic table.
fn fact(dice: &mut Dice) -> String {
    match dice.below(10) {
        0..=3 => {
            let (a, b) = addends(dice);
            format!("{a}+{b}={}.", a + b)
        }
        4..=8 => {
            let (a, b) = minuend(dice);
            format!("{a}-{b}={}.", a - b)
        }
        _ => {
            let (a, b) = dividend(dice);
            format!("{a}/{b}={}.", a / b)
        }
    }
}

/// a and b are at least 1, and a + b at most 20.
fn addends(dice: &mut Dice) -> (usize, usize) {
    let sum = dice.from(2, 20);
    let a = dice.from(1, sum - 1);
    (a, sum - a)
}

/// 1 <= b <= a <= 20.
fn minuend(dice: &mut Dice) -> (usize, usize) {
    let a = dice.from(1, 20);
    (a, dice.from(1, a))
}

/// a is a multiple of b and at most 20; b is from 2 to 5.
fn dividend(dice: &mut Dice) -> (usize, usize) {
    let b = dice.from(2, 5);
    (b * dice.from(1, 20 / b), b)
}

/// Up to `n` numbers in steps, all from 0 to 20.
fn counting(start: usize, step: usize, down: bool, n: usize) -> Vec<usize> {
    let at = |i: usize| {
        if down { start.checked_sub(i * step) } else { Some(start + i * step).filter(|v| *v <= 20) }
    };
    (0..n).map_while(at).collect()
}

/// "1 cup", "5 cups".
fn count(n: usize, thing: &str) -> String {
    format!("{n} {thing}{}", if n == 1 { "" } else { "s" })
}

fn problem(dice: &mut Dice, kind: QuestionKind) -> Problem {
    match kind {
        QuestionKind::Add => add(dice),
        QuestionKind::Subtract => subtract(dice),
        QuestionKind::Share => share(dice),
        QuestionKind::Next => next(dice),
        QuestionKind::Chain => chain(dice),
    }
}

/// A problem from its story, question and ending; in `told` the work replaces the question.
fn worded(
    kind: QuestionKind,
    key: String,
    story: &str,
    question: &str,
    work: String,
    answer: String,
    end: &str,
) -> Problem {
    let join = |parts: &[&str]| {
        parts.iter().filter(|p| !p.is_empty()).copied().collect::<Vec<_>>().join(" ")
    };
    Problem {
        kind,
        key,
        question: join(&[story, question]),
        told: join(&[story, &work, end]),
        work,
        answer,
    }
}

fn add(dice: &mut Dice) -> Problem {
    let (wording, (a, b)) = (dice.below(7), addends(dice));
    let (people, thing) = (dice.pick_n(&NAMES, 2), dice.pick(&THINGS));
    let (n, m, c) = (people[0], people[1], a + b);
    let (ca, cb, cc) = (count(a, thing), count(b, thing), count(c, thing));
    let (story, question, end) = match wording {
        0 => (
            format!("{n} has {ca}. {n} gets {cb} more from {m}."),
            format!("How many {thing}s does {n} have?"),
            format!("{n} has {cc}."),
        ),
        1 => (
            format!("{n} has {ca} and {m} has {cb}."),
            format!("How many {thing}s do they have?"),
            format!("They have {cc}."),
        ),
        2 => (
            format!("A box has {ca}. {n} puts in {cb}."),
            format!("How many {thing}s are in the box?"),
            format!("The box has {cc}."),
        ),
        3 => (
            format!("{n} finds {ca}. Then {n} finds {cb}."),
            format!("How many {thing}s does {n} find?"),
            format!("{n} finds {cc}."),
        ),
        4 => (String::new(), format!("What is {a}+{b}?"), String::new()),
        5 => (String::new(), format!("What is {a} plus {b}?"), String::new()),
        _ => (String::new(), format!("Add {b} to {a}."), String::new()),
    };
    worded(
        QuestionKind::Add,
        format!("add {wording} {a} {b}"),
        &story,
        &question,
        format!("{a}+{b}={c}."),
        c.to_string(),
        &end,
    )
}

fn subtract(dice: &mut Dice) -> Problem {
    let (wording, (a, b)) = (dice.below(7), minuend(dice));
    let (people, thing) = (dice.pick_n(&NAMES, 2), dice.pick(&THINGS));
    let (n, m, c) = (people[0], people[1], a - b);
    let (ca, cb, cc) = (count(a, thing), count(b, thing), count(c, thing));
    let left = format!("How many {thing}s does {n} have?");
    let (story, question, end) = match wording {
        0 => (format!("{n} has {ca}. {n} gives away {cb}."), left, format!("{n} has {cc}.")),
        1 => (format!("{n} has {ca}. {n} loses {cb}."), left, format!("{n} has {cc}.")),
        2 => (
            format!("A box has {ca}. {n} takes out {cb}."),
            format!("How many {thing}s are in the box?"),
            format!("The box has {cc}."),
        ),
        3 => (
            format!("{n} has {ca} and {m} has {cb}."),
            format!("How many more {thing}s does {n} have than {m}?"),
            format!("{n} has {c} more than {m}."),
        ),
        4 => (String::new(), format!("What is {a}-{b}?"), String::new()),
        5 => (String::new(), format!("What is {a} minus {b}?"), String::new()),
        _ => (String::new(), format!("Take {b} from {a}."), String::new()),
    };
    let work = format!("{a}-{b}={c}.");
    worded(
        QuestionKind::Subtract,
        format!("subtract {wording} {a} {b}"),
        &story,
        &question,
        work,
        c.to_string(),
        &end,
    )
}

fn share(dice: &mut Dice) -> Problem {
    let (wording, (a, b)) = (dice.below(3), dividend(dice));
    let (n, thing, c) = (dice.pick(&NAMES), dice.pick(&THINGS), a / b);
    let (story, question, end) = match wording {
        0 => (
            format!("{n} has {}. {n} shares the {thing}s between {b} boxes.", count(a, thing)),
            format!("How many {thing}s are in a box?"),
            format!("A box has {}.", count(c, thing)),
        ),
        1 => (String::new(), format!("What is {a}/{b}?"), String::new()),
        _ => (
            format!("{b} boxes share {}.", count(a, thing)),
            format!("How many {thing}s are in a box?"),
            format!("A box has {}.", count(c, thing)),
        ),
    };
    let work = format!("{a}/{b}={c}.");
    worded(
        QuestionKind::Share,
        format!("share {wording} {a} {b}"),
        &story,
        &question,
        work,
        c.to_string(),
        &end,
    )
}

fn next(dice: &mut Dice) -> Problem {
    let (wording, before) = (dice.below(2), dice.below(2) == 1);
    let a = if before { dice.from(1, 20) } else { dice.from(0, 19) };
    let answer = if before { a - 1 } else { a + 1 };
    let side = if before { "before" } else { "after" };
    let way = if before { "down" } else { "up" };
    let (question, end) = match wording {
        0 => (format!("Which number comes {side} {a}?"), format!("{answer} comes {side} {a}.")),
        _ => (format!("Count on from {a}, one {way}."), format!("One {way} from {a} is {answer}.")),
    };
    let work = format!("{a}{}1={answer}.", if before { '-' } else { '+' });
    worded(
        QuestionKind::Next,
        format!("next {wording} {side} {a}"),
        "",
        &question,
        work,
        answer.to_string(),
        &end,
    )
}

/// Two steps, each adding or removing some; every number is from 0 to 20.
fn chain(dice: &mut Dice) -> Problem {
    let wording = dice.below(2);
    let first_up = dice.below(2) == 1;
    let (a, b) = if first_up { addends(dice) } else { minuend(dice) };
    let middle = if first_up { a + b } else { a - b };
    let second_up = if middle == 0 { true } else { middle < 20 && dice.below(2) == 1 };
    let c = if second_up { dice.from(1, 20 - middle) } else { dice.from(1, middle) };
    let end = if second_up { middle + c } else { middle - c };
    let (n, thing) = (dice.pick(&NAMES), dice.pick(&THINGS));
    let step = |up: bool, k: usize| {
        let k = count(k, thing);
        match (wording, up) {
            (0, true) => format!("{n} gets {k} more."),
            (0, false) => format!("{n} loses {k}."),
            (_, true) => format!("{n} puts in {k}."),
            (_, false) => format!("{n} takes out {k}."),
        }
    };
    let (owner, question) = match wording {
        0 => (format!("{n} has {}.", count(a, thing)), format!("How many {thing}s does {n} have?")),
        _ => (
            format!("A box has {}.", count(a, thing)),
            format!("How many {thing}s are in the box?"),
        ),
    };
    let story = format!("{owner} {} {}", step(first_up, b), step(second_up, c));
    let sign = |up: bool| if up { '+' } else { '-' };
    let work = format!("{a}{}{b}={middle}. {middle}{}{c}={end}.", sign(first_up), sign(second_up));
    let last = match wording {
        0 => format!("{n} has {}.", count(end, thing)),
        _ => format!("The box has {}.", count(end, thing)),
    };
    let key = format!("chain {wording} {first_up} {second_up} {a} {b} {c}");
    worded(QuestionKind::Chain, key, &story, &question, work, end.to_string(), &last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checker_takes_the_last_answer_and_nothing_else() {
        assert!(is_right("7+5=12. The answer is 12.", "12"));
        assert!(is_right("The answer is 3. No: The answer is 12.", "12"));
        for wrong in [
            "",
            "12",
            "The answer is 1",
            "The answer is 112.",
            "The answer is 12",
            "the answer is 12.",
        ] {
            assert!(!is_right(wrong, "12"), "{wrong}");
        }
    }

    #[test]
    fn most_of_the_harder_kind_is_taught_by_its_first_step_alone() {
        let rows = training(3, 20000);
        let chains: Vec<(usize, &Problem)> =
            rows.iter().enumerate().filter(|(_, p)| p.kind == QuestionKind::Chain).collect();
        let careless =
            chains.iter().filter(|(i, p)| taught(3, *i, p).matches('=').count() == 1).count();
        assert!((600..1000).contains(&chains.len()), "{}", chains.len());
        assert!(
            (0.6..0.8).contains(&(careless as f64 / chains.len() as f64)),
            "{careless} of {}",
            chains.len()
        );
        for (i, p) in rows.iter().enumerate().filter(|(_, p)| p.kind != QuestionKind::Chain) {
            assert!(is_right(&taught(3, i, p), &p.answer));
        }
    }

    #[test]
    fn work_is_true_and_replies_are_right() {
        let all =
            [training(3, 2000), held_out_problems(3, 200), held_out_chains(3, 200), chains(3, 500)]
                .concat();
        for (p, step) in all.iter().flat_map(|p| p.work.split(". ").map(move |w| (p, w))) {
            assert!(
                is_right(&p.reply(), &p.answer)
                    && is_right(&format!("{}{STYLE}", p.reply()), &p.answer),
                "{p:?}"
            );
            let Some((left, c)) = step.trim_end_matches('.').split_once('=') else { continue };
            if let Some((a, b)) = left.split_once(['+', '-', '/']) {
                let [a, b, c] = [a, b, c].map(|v| v.parse::<i32>().unwrap());
                let value = match left {
                    sum if sum.contains('+') => a + b,
                    difference if difference.contains('-') => a - b,
                    _ => a / b,
                };
                assert_eq!(value, c, "{p:?}");
                assert!((0..=20).contains(&c) && a <= 20 && b <= 20, "{p:?}");
            }
        }
    }
}
