//! Translates the tokens of a Jinja2 template to a template for minijinja. Layer 6.
//!
//! Invariant: whitespace, string escapes and numbers mean the same as in Jinja2, and no expression
//! is long or deep enough to exhaust the compiler's stack.

use super::lexer::{Fault, Token, lex};
use super::rewrite::{Rewrite, UNDEFINED, macros, split};

/// The template variables that hold the markers of generation blocks at render time.
pub const OPEN: &str = "__temper_open";
pub const CLOSE: &str = "__temper_close";
/// Begins every delimiter: a noncharacter, so that no template text looks like a tag.
pub const MARK: char = '\u{FDD1}';
/// Limits on the tokens in one tag, and on nested brackets, blocks or signs. Real templates stay
/// below 200 and 20; Python itself refuses to compile more than about 90 nested brackets.
const MAX_TOKENS: usize = 4000;
const MAX_OPERATORS: usize = 250;
const MAX_DEPTH: usize = 60;
/// Statements that need other templates or a Jinja2 extension.
const REFUSED: [&str; 9] =
    ["include", "import", "from", "extends", "do", "autoescape", "trans", "pluralize", "debug"];

/// Returns the source for minijinja and the number of generation blocks.
pub fn emit(source: &str) -> Result<(String, usize), Fault> {
    if source.contains(MARK) {
        return Err(("the noncharacter U+FDD1 is not supported".into(), 1));
    }
    let tokens = lex(source)?.tokens;
    let macros = macros(&tokens)?;
    let mut inner: Vec<&str> = Vec::new(); // the open blocks
    let (mut out, mut line, mut blocks) = (String::new(), 1, 0);
    let mut elifs = 0; // each nests inside the previous branch
    let mut i = 0;
    while let Some((token, at)) = tokens.get(i) {
        i += 1;
        let begin = match token {
            Token::Data(text) => {
                line += text.matches('\n').count();
                out.push_str(text);
                continue;
            }
            Token::VariableBegin => '{',
            _ => '%',
        };
        let length = tokens[i..]
            .iter()
            .position(|(t, _)| matches!(t, Token::VariableEnd | Token::BlockEnd))
            .unwrap_or(0);
        let inside = &tokens[i..i + length];
        i += length + 1;
        bounded(inside, *at)?;
        let word = match inside.first() {
            Some((Token::Name(name), _)) if begin == '%' => name.as_str(),
            _ => "",
        };
        match word {
            "generation" => {
                blocks += 1;
                out += &format!("{MARK}% with %{MARK}{MARK}{{ {OPEN} }}{MARK}");
                out += &format!("{MARK}% set __temper = 0 %{MARK}");
            }
            "endgeneration" => {
                out += &format!("{MARK}{{ {CLOSE} }}{MARK}{MARK}% endwith %{MARK}");
            }
            word if REFUSED.contains(&word) => {
                return Err((format!("the statement '{word}' is not supported"), *at));
            }
            _ => {
                out.push(MARK);
                out.push(begin);
                // Keep each tag on its source line, because errors name the line.
                while line < *at {
                    out.push('\n');
                    line += 1;
                }
                if inner.contains(&"macro") && extra(inside) {
                    let what = "varargs and kwargs of a macro are not supported";
                    return Err((what.into(), *at));
                }
                if word == "set" {
                    target(inside).map_err(|what| (what, *at))?;
                }
                let soft = matches!(inner.last(), Some(&"if"));
                let inside = Rewrite { macros: &macros, word, soft }.tag(inside)?;
                let inside = if word.is_empty() { tuple(inside) } else { inside };
                let (inside, defaults) =
                    if word == "macro" { defaults(&inside) } else { (inside, String::new()) };
                tag(&inside, word, &mut out);
                out.push(' ');
                out.push(if begin == '{' { '}' } else { '%' });
                out.push(MARK);
                out += &defaults;
            }
        }
        elifs += usize::from(word == "elif");
        let opens = match word {
            "if" | "for" | "with" | "macro" | "call" | "filter" | "block" | "generation" => true,
            "set" => !inside.iter().any(|t| t.0 == Token::Op("=")),
            _ => false,
        };
        if opens {
            inner.push(word);
        } else if word.starts_with("end") {
            inner.pop();
        }
        if inner.len() > MAX_DEPTH || elifs > MAX_OPERATORS {
            return Err(("the blocks are nested too deeply".into(), *at));
        }
    }
    Ok((out, blocks))
}

/// Puts parentheses around a tuple that is printed.
fn tuple(mut tokens: Vec<(Token, usize)>) -> Vec<(Token, usize)> {
    if split(&tokens).len() > 1 {
        let line = tokens[0].1;
        tokens.insert(0, (Token::Op("("), line));
        tokens.push((Token::Op(")"), line));
    }
    tokens
}

/// Refuses an assignment to an attribute except `{% set x.y = ... %}`, whose value is checked, and
/// `{% set x.y %}`, which assigns text.
fn target(tokens: &[(Token, usize)]) -> Result<(), String> {
    let end = tokens.iter().position(|t| matches!(t.0, Token::Op("=" | "|")));
    let head = &tokens[..end.unwrap_or(tokens.len())];
    let dots = head.iter().filter(|t| t.0 == Token::Op(".")).count();
    let filtered = end.is_some_and(|at| tokens[at].0 == Token::Op("|"));
    let known = head.len() == 4 && head[2].0 == Token::Op(".") && !filtered;
    if dots == 0 || (dots == 1 && known) {
        return Ok(());
    }
    Err("an attribute as a target is supported only in {% set x.y = ... %}".into())
}

/// Whether an expression reads `varargs` or `kwargs`.
fn extra(tokens: &[(Token, usize)]) -> bool {
    tokens.iter().enumerate().any(|(i, (token, _))| {
        let near = |at: Option<usize>, ops: [&str; 2]| {
            let token = at.and_then(|at| tokens.get(at)).map(|t| &t.0);
            matches!(token, Some(Token::Op(op)) if ops.contains(op))
        };
        matches!(token, Token::Name(n) if n == "varargs" || n == "kwargs")
            && !near(i.checked_sub(1), [".", "|"])
            && !near(Some(i + 1), ["=", "="])
    })
}

/// Whether these tokens test if the name before them is defined.
fn asks_if_defined(next: &[(Token, usize)]) -> bool {
    let word = |i: usize| match next.get(i) {
        Some((Token::Name(name), _)) => name.as_str(),
        _ => "",
    };
    let test = if word(1) == "not" { word(2) } else { word(1) };
    word(0) == "is" && matches!(test, "defined" | "undefined")
}

/// Rejects expressions that would exhaust the stack of a recursive compiler.
fn bounded(tokens: &[(Token, usize)], line: usize) -> Result<(), Fault> {
    let (mut depth, mut operators, mut signs) = (0usize, vec![0usize], 0);
    for (i, (token, _)) in tokens.iter().enumerate() {
        let asked = asks_if_defined(&tokens[i + 1..]);
        let prefix = matches!(token, Token::Op("-" | "+"))
            || matches!(token, Token::Name(n) if matches!(n.as_str(), "not" | "else"));
        signs = if prefix { signs + 1 } else { 0 };
        match token {
            // Jinja2's lipsum returns random text; a template may still test whether it is defined.
            Token::Name(n) if n == "lipsum" && asked => {}
            Token::Name(n) if matches!(n.as_str(), "lipsum" | "self" | "super") => {
                return Err((format!("'{n}' is not supported"), line));
            }
            Token::Op("(" | "[" | "{") => {
                depth += 1;
                operators.push(0);
            }
            Token::Op(")" | "]" | "}") => {
                depth = depth.saturating_sub(1);
                operators.pop();
            }
            Token::Op("," | ":") => _ = operators.last_mut().map(|n| *n = 0),
            Token::Op(_) | Token::Name(_) => _ = operators.last_mut().map(|n| *n += 1),
            _ => {}
        }
        if depth > MAX_DEPTH || signs > MAX_DEPTH {
            return Err(("the expression is nested too deeply".into(), line));
        }
        if operators.last().is_some_and(|n| *n > MAX_OPERATORS) || tokens.len() > MAX_TOKENS {
            return Err(("the expression is too long".into(), line));
        }
    }
    Ok(())
}

/// Writes the contents of a tag. New values pass through `_held`, which bounds them; those that are
/// generators in Jinja2 pass through `_lazy`.
fn tag(tokens: &[(Token, usize)], word: &str, out: &mut String) {
    let mut open: Vec<String> = Vec::new(); // what follows each closing bracket
    let mut lazy = false;
    let assigned = word == "set" && matches!(tokens.get(2), Some((Token::Op("."), _)));
    let mut tail = "";
    for (i, (token, _)) in tokens.iter().enumerate() {
        let before = i.checked_sub(1).map(|i| &tokens[i].0);
        let operand = match before {
            Some(Token::Name(n)) => !WORDS.contains(&n.as_str()),
            Some(Token::Op(op)) => matches!(*op, ")" | "]" | "}"),
            Some(Token::Str(_)) => true,
            _ => false,
        };
        out.push(' ');
        match token {
            Token::Op("[" | "{") if !operand => {
                out.push('(');
                write(token, out);
                open.push("|_held)".into());
            }
            Token::Op("(" | "[" | "{") => {
                write(token, out);
                open.push(if lazy { "|_lazy" } else { "" }.into());
                lazy = false;
            }
            Token::Op(")" | "]" | "}") => {
                write(token, out);
                out.push_str(&open.pop().unwrap_or_default());
            }
            Token::Op("=") if assigned && open.is_empty() && tail.is_empty() => {
                out.push_str("= (");
                tail = ")|_stored";
            }
            Token::Name(name)
                if word == "for" && open.is_empty() && name == "in" && tail.is_empty() =>
            {
                out.push_str("in (");
                tail = ")|_iter";
            }
            Token::Name(name)
                if word == "for"
                    && open.is_empty()
                    && matches!(name.as_str(), "if" | "recursive") =>
            {
                out.push_str(std::mem::take(&mut tail));
                out.push(' ');
                write(token, out);
            }
            _ => write(token, out),
        }
        if let (Token::Name(name), Some(Token::Op("|"))) = (token, before)
            && LAZY.contains(&name.as_str())
        {
            lazy = matches!(tokens.get(i + 1), Some((Token::Op("("), _)));
            out.push_str(if lazy { "" } else { "|_lazy" });
        }
    }
    out.push_str(tail);
}

/// Words after which a bracket opens a list, not a subscript.
const WORDS: [&str; 9] = ["in", "if", "else", "elif", "and", "or", "not", "is", "set"];
const LAZY: [&str; 8] =
    ["map", "select", "reject", "selectattr", "rejectattr", "batch", "slice", "unique"];

/// Moves the defaults of a macro's arguments to the top of its body: in the head minijinja does not
/// see the other arguments, and treats an undefined argument as missing.
fn defaults(tokens: &[(Token, usize)]) -> (Vec<(Token, usize)>, String) {
    let (mut head, mut body) = (Vec::new(), String::new());
    let mut i = 0;
    while i < tokens.len() {
        let (name, is_default) = match (&tokens[i].0, tokens.get(i + 1)) {
            (Token::Name(name), Some((Token::Op("="), _))) => (name.clone(), true),
            _ => (String::new(), false),
        };
        head.push(tokens[i].clone());
        i += 1;
        if !is_default {
            continue;
        }
        let mut depth = 0;
        let length = tokens[i..].iter().position(|(t, _)| {
            match t {
                Token::Op("(" | "[" | "{") => depth += 1,
                Token::Op(")" | "]" | "}") => depth -= 1,
                _ => {}
            }
            depth < 0 || (depth == 0 && matches!(t, Token::Op(",")))
        });
        let end = i + length.unwrap_or(tokens.len() - i);
        let value = &tokens[i + 1..end];
        head.extend([(Token::Op("="), tokens[i].1), (Token::Name("_missing".into()), tokens[i].1)]);
        body += &format!("{MARK}% if {name} is undefined %{MARK}{MARK}% set {name} =");
        tag(value, "", &mut body);
        body += &format!(" %{MARK}{MARK}% elif {name} == \"{UNDEFINED}\" %{MARK}");
        body += &format!("{MARK}% set {name} = _missing %{MARK}{MARK}% endif %{MARK}");
        i = end;
    }
    (head, body)
}

fn write(token: &Token, out: &mut String) {
    match token {
        Token::Name(name) => out.push_str(name),
        Token::Int(digits) => out.push_str(digits),
        Token::Float(x) => out.push_str(&format!("{x:?}")),
        Token::Op(op) => out.push_str(op),
        Token::Str(text) => {
            out.push('"');
            for c in text.chars() {
                match c {
                    '"' => out.push_str("\\\""),
                    '\\' => out.push_str("\\\\"),
                    '\n' => out.push_str("\\n"),
                    '\r' => out.push_str("\\r"),
                    c => out.push(c),
                }
            }
            out.push('"');
        }
        _ => {}
    }
}
