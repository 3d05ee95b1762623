//! The number that a text gives as its answer. Layer 6.
//!
//! Invariant: `\boxed{}` takes precedence over `####`, and `####` over the last number of the text.
//! Thousands separators, units, currency and percent signs are dropped; fractions are divided. Two
//! answers are equal if they differ by at most 1e-6 of the larger one, or by 1e-6 below 1.

use std::sync::LazyLock;

use fancy_regex::Regex;

const UNSIGNED: &str = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?";

/// A signed number, or a quotient of two, that is not part of a word. A minus after a digit or
/// letter is an operator.
static NUMBER: LazyLock<Option<Regex>> = LazyLock::new(|| {
    Regex::new(&format!(r"(?<![\w.])([-+])?({UNSIGNED})(?:\s*/\s*({UNSIGNED}))?")).ok()
});
static FRACTION: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}").ok());
/// The exponent of a unit: cm^2, \text{m}^{3}
static UNIT_POWER: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"(?<=[A-Za-z}])\s*\^\s*\{?\d+\}?").ok());

/// The answer of a text; `None` if it has no number.
pub fn answer(text: &str) -> Option<f64> {
    if let Some(inside) = boxed(text) {
        return first(&clean(inside));
    }
    if let Some((_, after)) = text.rsplit_once("####") {
        return first(&clean(after));
    }
    numbers(&clean(text)).last().copied()
}

pub fn same(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-6 * a.abs().max(b.abs()).max(1.0)
}

/// The content of the last `\boxed{...}`, with its braces balanced.
fn boxed(text: &str) -> Option<&str> {
    let inside = &text[text.rfind("\\boxed{")? + "\\boxed{".len()..];
    let mut depth = 1;
    for (i, c) in inside.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(&inside[..i]);
        }
    }
    None
}

/// The first number after the last equals sign: `x = 5 cm` gives 5. Not the last, since units may
/// contain numbers.
fn first(text: &str) -> Option<f64> {
    let value = text.rsplit_once('=').map_or(text, |(_, v)| v);
    numbers(value).first().copied()
}

fn clean(text: &str) -> String {
    let mut s = text.replace('\u{2212}', "-").replace("{,}", ",");
    for gone in ["\\,", "\\!", "\\;", "\\$", "$", "\\%", "%", "\\left", "\\right", "€", "£"] {
        s = s.replace(gone, "");
    }
    if let Some(power) = UNIT_POWER.as_ref() {
        let kept = mark_fractions(&s);
        s = power.replace_all(&kept, "").into_owned();
    }
    s
}

/// Replaces `\frac{a}{b}` by `a/b`.
fn mark_fractions(text: &str) -> String {
    FRACTION
        .as_ref()
        .map_or_else(|| text.to_string(), |f| f.replace_all(text, "$1/$2").into_owned())
}

fn numbers(text: &str) -> Vec<f64> {
    let Some(pattern) = NUMBER.as_ref() else { return Vec::new() };
    let value = |m: Option<fancy_regex::Match>| {
        m.and_then(|m| m.as_str().replace(',', "").parse::<f64>().ok())
    };
    let mut all = Vec::new();
    for found in pattern.captures_iter(text).map_while(|c| c.ok()) {
        let sign = if found.get(1).is_some_and(|s| s.as_str() == "-") { -1.0 } else { 1.0 };
        let Some(top) = value(found.get(2)) else { continue };
        let bottom = value(found.get(3)).filter(|b| *b != 0.0).unwrap_or(1.0);
        all.push(sign * top / bottom);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_of_a_text_is_read_as_people_write_it() {
        let cases: &[(&str, Option<f64>)] = &[
            ("The answer is 42.", Some(42.0)),
            ("2 + 3 = 5, so 5 apples", Some(5.0)),
            ("She pays $1,234.50 in total.", Some(1234.5)),
            ("#### 1,000", Some(1000.0)),
            ("first 7\n#### -3 km", Some(-3.0)),
            (r"so \boxed{12} and not 13", Some(12.0)),
            (r"\boxed{\frac{3}{4}}", Some(0.75)),
            (r"\boxed{-\dfrac{1}{2}}", Some(-0.5)),
            (r"\boxed{x = 5 \text{ cm}^2}", Some(5.0)),
            (r"\boxed{1{,}000\,\text{m}}", Some(1000.0)),
            ("It is 50%.", Some(50.0)),
            ("area: 42 cm^2", Some(42.0)),
            ("3/8 of it", Some(0.375)),
            ("between 3-4", Some(4.0)),
            ("- 5 apples", Some(5.0)),
            ("value -.5", Some(-0.5)),
            ("1.5e3 J", Some(1500.0)),
            ("x2 and H2O", None),
            ("temperature \u{2212}4", Some(-4.0)),
            ("no number", None),
            (r"\boxed{}", None),
        ];
        for (text, want) in cases {
            assert_eq!(answer(text), *want, "{text}");
        }
    }

    #[test]
    fn answers_are_compared_by_their_size() {
        assert!(same(1.0 / 3.0, 0.3333333) && same(1e9, 1e9 + 1.0));
        assert!(!same(1.0, 1.001) && !same(f64::NAN, 1.0));
    }
}
