//! The operator `%`: what is left of a division, or Python's formatting of a string. Layer 6.
//!
//! Invariant: `a % b` becomes the filter `_rem` of its left side, at Jinja2's precedence; numbers have
//! Python's sign; what Python refuses is an error.

use minijinja::value::{Kwargs, Rest, Value, ValueKind};
use minijinja::{Environment, Error, State};

use super::filters::format_values;
use super::lexer::Token;
use super::python::{fault, held};

type Tokens = Vec<(Token, usize)>;

pub fn install(env: &mut Environment<'static>) {
    env.add_filter("_rem", |state: &mut State, left: Value, right: Rest<Value>| {
        right.iter().try_fold(left, |left, right| match left.as_str() {
            Some(_) => formatted(state, left, right),
            None => remainder(&left, right),
        })
    });
}

/// Writes the remainders of an operand, which has no comparison outside of its brackets, as filters.
pub fn rewrite(operand: Tokens) -> Tokens {
    if !top(&operand).any(|i| matches!(operand[i].0, Token::Op("%"))) {
        return operand;
    }
    let ends: Vec<usize> = top(&operand).collect();
    let (mut out, mut from) = (Tokens::new(), 0);
    for at in ends {
        let sum = matches!(operand[at].0, Token::Op("+" | "-" | "~"));
        // A sign has nothing before it, or an operator.
        let sign = at == from || matches!(operand[at - 1].0, Token::Op(op) if !closes(op));
        if sum && !sign {
            out.extend(product(&operand[from..at]));
            out.push(operand[at].clone());
            from = at + 1;
        }
    }
    out.extend(product(&operand[from..]));
    out
}

fn closes(op: &str) -> bool {
    matches!(op, ")" | "]" | "}")
}

/// The tokens outside of brackets; of brackets themselves, the first.
fn top(tokens: &[(Token, usize)]) -> impl Iterator<Item = usize> {
    let mut depth = 0usize;
    (0..tokens.len()).filter(move |i| match tokens[*i].0 {
        Token::Op("(" | "[" | "{") => {
            depth += 1;
            depth == 1
        }
        Token::Op(op) if closes(op) => {
            depth = depth.saturating_sub(1);
            false
        }
        _ => depth == 0,
    })
}

/// Factors between `*`, `/`, `//` and `%`, which are taken from the left.
fn product(tokens: &[(Token, usize)]) -> Tokens {
    let operator = |i: &usize| matches!(tokens[*i].0, Token::Op("*" | "/" | "//" | "%"));
    let operators: Vec<usize> = top(tokens).filter(operator).collect();
    if !operators.iter().any(|i| matches!(tokens[*i].0, Token::Op("%"))) {
        return tokens.to_vec();
    }
    let ends = operators.iter().copied().chain([tokens.len()]);
    let starts = [0].into_iter().chain(operators.iter().map(|i| i + 1));
    let factors: Vec<&[(Token, usize)]> = starts.zip(ends).map(|(a, b)| &tokens[a..b]).collect();
    if factors.iter().any(|factor| factor.is_empty()) {
        return tokens.to_vec(); // the engine says what is missing
    }
    let mut left = factors[0].to_vec();
    let mut before = "";
    for (at, factor) in operators.into_iter().zip(&factors[1..]) {
        let (token, line) = &tokens[at];
        let Token::Op(op) = token else { continue };
        let of = |op: &'static str| (Token::Op(op), *line);
        match (*op, before) {
            ("%", "%") => {
                // one more for the filter that is there
                left.truncate(left.len() - 2);
                left.push(of(","));
            }
            ("%", _) => {
                left.splice(0..0, [of("("), of("(")]);
                left.extend([of(")"), of("|"), (Token::Name("_rem".into()), *line), of("(")]);
            }
            _ => left.push((token.clone(), *line)),
        }
        left.extend_from_slice(factor);
        if *op == "%" {
            left.extend([of(")"), of(")")]);
        }
        before = op;
    }
    left
}

fn remainder(a: &Value, b: &Value) -> Result<Value, Error> {
    let whole = |v: &Value| match v.kind() {
        ValueKind::Bool => Some(i128::from(v.is_true())),
        _ if v.is_integer() => i128::try_from(v.clone()).ok(),
        _ => None,
    };
    let number = |v: &Value| match v.kind() {
        ValueKind::Bool => Some(f64::from(u8::from(v.is_true()))),
        ValueKind::Number => f64::try_from(v.clone()).ok(),
        _ => None,
    };
    if let (Some(a), Some(b)) = (whole(a), whole(b)) {
        return match a.checked_rem(b) {
            Some(rest) if rest != 0 && (rest < 0) != (b < 0) => Ok(Value::from(rest + b)),
            Some(rest) => Ok(Value::from(rest)),
            None => fault("a division by zero"),
        };
    }
    // The engine's whole numbers go up to 128 bits, without a sign.
    if a.is_integer() && b.is_integer() {
        let large = |v: &Value| u128::try_from(v.clone()).ok();
        return match large(a).zip(large(b)).and_then(|(a, b)| a.checked_rem(b)) {
            Some(rest) => Ok(Value::from(rest)),
            None => fault("the remainder of so large a number is not supported"),
        };
    }
    match (number(a), number(b)) {
        (Some(_), Some(0.0)) => fault("a division by zero"),
        (Some(a), Some(b)) => {
            let rest = a % b;
            let rest = match rest {
                0.0 => 0.0f64.copysign(b),
                _ if (rest < 0.0) != (b < 0.0) => rest + b,
                _ => rest,
            };
            Ok(Value::from(rest))
        }
        _ => fault(format!("% is not for values of type {} and {}", a.kind(), b.kind())),
    }
}

/// Python's `text % value`: a tuple holds the values, a mapping those that have names.
fn formatted(state: &mut State, text: Value, value: &Value) -> Result<Value, Error> {
    held(state, value.clone())?;
    let source = text.as_str().unwrap_or_default();
    let conversions = conversions(source);
    if conversions.named {
        if value.kind() != ValueKind::Map || conversions.plain > 0 {
            return fault("a format with names takes a mapping, and no other values");
        }
        let mut named = Vec::new();
        for key in value.try_iter()? {
            if let Some(name) = key.as_str() {
                named.push((name.to_string(), value.get_item(&key)?));
            }
        }
        let named: Kwargs = named.into_iter().collect();
        return format_values(state, text, Rest(vec![Value::from(named)]));
    }
    let values: Vec<Value> = match value.is_tuple() {
        true => value.try_iter()?.collect(),
        false => vec![value.clone()],
    };
    // What can be asked for an item may stay unused.
    let may_stay = !value.is_tuple() && matches!(value.kind(), ValueKind::Seq | ValueKind::Map);
    if conversions.plain < values.len() && !may_stay {
        return fault("not all values are used by the format");
    }
    let used = values.into_iter().take(conversions.plain).collect();
    format_values(state, text, Rest(used))
}

/// What a format asks for.
struct Conversions {
    /// Values by their order, widths that are given as values among them.
    plain: usize,
    /// Some value by its name.
    named: bool,
}

fn conversions(format: &str) -> Conversions {
    let mut found = Conversions { plain: 0, named: false };
    let mut chars = format.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '%' {
            continue;
        }
        let named = chars.peek() == Some(&'(');
        if named {
            chars.by_ref().find(|c| *c == ')');
        }
        for c in chars.by_ref() {
            match c {
                '*' => found.plain += 1,
                '-' | '+' | ' ' | '#' | '.' | 'h' | 'l' | 'L' | '0'..='9' => {}
                '%' => break,
                _ => {
                    found.plain += usize::from(!named);
                    break;
                }
            }
        }
        found.named |= named;
    }
    found
}
