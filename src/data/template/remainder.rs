//! Rewrites the operator `%` as a filter, since minijinja supports it for numbers only. Layer 6.
//!
//! Invariant: `a % b` becomes the filter `_rem` of its left side, at Jinja2's precedence.

use super::lexer::Token;

type Tokens = Vec<(Token, usize)>;

/// Rewrites the remainders in an operand that has no comparison outside brackets.
pub fn rewrite(operand: Tokens) -> Tokens {
    if !top(&operand).any(|i| matches!(operand[i].0, Token::Op("%"))) {
        return operand;
    }
    let ends: Vec<usize> = top(&operand).collect();
    let (mut out, mut from) = (Tokens::new(), 0);
    for at in ends {
        let sum = matches!(operand[at].0, Token::Op("+" | "-" | "~"));
        // A sign follows an operator or nothing.
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

/// Returns the indices of tokens outside brackets, and of each outermost opening bracket.
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

/// Rewrites a product of factors joined by `*`, `/`, `//` and `%`, which associate to the left.
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
        return tokens.to_vec(); // minijinja reports what is missing
    }
    let mut left = factors[0].to_vec();
    let mut before = "";
    for (at, factor) in operators.into_iter().zip(&factors[1..]) {
        let (token, line) = &tokens[at];
        let Token::Op(op) = token else { continue };
        let of = |op: &'static str| (Token::Op(op), *line);
        match (*op, before) {
            ("%", "%") => {
                // append to the existing filter's arguments
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
