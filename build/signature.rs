//! Reads what a `.cu` or `.cuh` file declares for both languages: kernels (`KERNEL...` at the start
//! of a line) and facts (`EXPORT...`). `kernels/README.md` describes the forms.
//!
//! Invariant: bad input is an error that gives the file and the line and says what to write; all
//! errors of a file are reported at once.

use std::fmt;

/// What one file declares.
#[derive(Debug, Default, PartialEq)]
pub struct Source {
    pub kernels: Vec<Kernel>,
    pub exports: Vec<Export>,
}

#[derive(Debug, PartialEq)]
pub struct Kernel {
    pub name: String,
    pub kind: Kind,
    /// The values of template parameter D; empty if not templated.
    pub d: Vec<u32>,
    /// The largest block.
    pub threads: u32,
    /// (D, n): that instance leaves registers for n blocks per SM; None: every instance.
    pub blocks: Vec<(Option<u32>, u32)>,
    /// Bytes of dynamic shared memory, in terms of D and sizeof(real).
    pub shared: Option<Expr>,
    pub hot: bool,
    /// It waits for the kernel before it in its own body.
    pub waits: bool,
    pub params: Vec<Param>,
    pub doc: String,
}

/// What the threads of a block share.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// Everything: on a CPU each thread is a fiber.
    Fiber,
    Flat,
    Warp,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Param {
    pub name: String,
    pub role: Role,
    /// For pointers, the type of the element.
    pub ty: Type,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Role {
    In,
    Out,
    MaybeIn,
    MaybeOut,
    Scalar,
    /// A tensor map, by value.
    Map,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Type {
    Real,
    Float,
    Bf16,
    Int,
    Unsigned,
    Byte,
    Long,
}

impl Type {
    /// The C++ name.
    pub fn c(self) -> &'static str {
        match self {
            Type::Real => "real",
            Type::Float => "float",
            Type::Bf16 => "bf16",
            Type::Int => "int",
            Type::Unsigned => "unsigned",
            Type::Byte => "unsigned char",
            Type::Long => "long long",
        }
    }

    fn of(name: &str, pointer: bool) -> Option<Type> {
        let scalars = [Type::Int, Type::Unsigned, Type::Float, Type::Long];
        let elements = [Type::Real, Type::Float, Type::Bf16, Type::Int, Type::Unsigned, Type::Byte];
        let allowed: &[Type] = if pointer { &elements } else { &scalars };
        allowed.iter().copied().find(|t| t.c() == name)
    }
}

/// A fact that both languages need.
#[derive(Debug, PartialEq)]
pub struct Export {
    pub name: String,
    pub fact: Fact,
    pub doc: String,
}

#[derive(Debug, PartialEq)]
pub enum Fact {
    Constant {
        unsigned: bool,
        value: Expr,
    },
    /// A function of one int.
    Function {
        param: String,
        body: Expr,
    },
    /// Names numbered from 0.
    Numbers(Vec<String>),
}

/// An integer expression. `Display` writes it in Rust syntax.
#[derive(Clone, Debug, PartialEq)]
pub enum Expr {
    Number(i64),
    Name(String),
    Call(String, Box<Expr>),
    Binary(&'static str, Box<Expr>, Box<Expr>),
    Choose(Box<Expr>, Box<Expr>, Box<Expr>),
}

/// Parses a file; errors begin with `file:line:`.
pub fn parse(file: &str, text: &str) -> Result<Source, Vec<String>> {
    let (mut source, mut errors) = (Source::default(), Vec::new());
    let mut start = 0;
    for line in text.split_inclusive('\n') {
        let (rest, before) = (&text[start..], &text[..start]);
        let parsed = if line.starts_with("KERNEL") {
            kernel(rest, before).map(|k| source.kernels.push(k))
        } else if line.starts_with("EXPORT") {
            export(rest, before).map(|e| source.exports.push(e))
        } else {
            Ok(())
        };
        if let Err(what) = parsed {
            errors.push(format!("{file}:{}: {what}", before.matches('\n').count() + 1));
        }
        start += line.len();
    }
    if errors.is_empty() { Ok(source) } else { Err(errors) }
}

/// `MACRO(inside) rest`, split.
fn call(text: &str) -> Result<(&str, &str, &str), String> {
    let open = text.find('(').filter(|at| text[..*at].chars().all(is_word));
    let Some(open) = open else {
        return Err(
            "expected an opening parenthesis after the macro; write KERNEL(name, ...)(...)"
                .to_string(),
        );
    };
    let inside = &text[open + 1..];
    let close = matching_paren(inside)
        .filter(|close| !inside[..*close].contains(['{', ';']))
        .ok_or(format!("{} is not closed; write {0}(...)", &text[..open]))?;
    Ok((&text[..open], &inside[..close], inside[close + 1..].trim_start()))
}

fn kernel(text: &str, before: &str) -> Result<Kernel, String> {
    let (keyword, attributes, rest) = call(text)?;
    let kind = match keyword {
        "KERNEL" => Kind::Fiber,
        "KERNEL_FLAT" => Kind::Flat,
        "KERNEL_WARP" => Kind::Warp,
        other => {
            return Err(format!(
                "{other} is no kind of kernel; write KERNEL, KERNEL_FLAT or KERNEL_WARP"
            ));
        }
    };
    let mut kernel = Kernel {
        name: String::new(),
        kind,
        d: Vec::new(),
        threads: 256,
        blocks: Vec::new(),
        shared: None,
        hot: false,
        waits: false,
        params: Vec::new(),
        doc: doc_above(before),
    };
    set_attributes(&mut kernel, attributes)?;
    let name = &kernel.name;
    let Some(params) = rest.strip_prefix('(') else {
        return Err(format!(
            "expected the parameters of {name}; write {keyword}({name})(const real* x, int n) {{"
        ));
    };
    let end = matching_paren(params)
        .filter(|end| !params[..*end].contains('{'))
        .ok_or(format!("the parameters of {name} are not closed; write ) before {{"))?;
    kernel.params = without_comments(&params[..end])
        .split(',')
        .map(|p| p.split_whitespace().collect::<Vec<_>>().join(" "))
        .filter(|p| !p.is_empty())
        .map(|p| parameter(&p).map_err(|e| format!("parameter \"{p}\" of {name}: {e}")))
        .collect::<Result<_, _>>()?;
    Ok(kernel)
}

fn set_attributes(kernel: &mut Kernel, text: &str) -> Result<(), String> {
    let mut in_d = false;
    for (i, part) in top_level(text).into_iter().map(str::trim).enumerate() {
        let number = |v: &str| {
            v.parse::<u32>().map_err(|_| format!("{part}: expected a whole number, not \"{v}\""))
        };
        let more_d = in_d && !part.contains('=') && !["HOT", "WAITS"].contains(&part);
        in_d = false;
        if i == 0 {
            if part.is_empty() || !part.chars().all(is_word) {
                return Err(format!("expected the kernel's name first, not \"{part}\""));
            }
            kernel.name = part.to_string();
        } else if let Some(v) = part.strip_prefix("D=").or(more_d.then_some(part)) {
            kernel.d.push(number(v).map_err(|e| format!("{e}; write D=64,128"))?);
            in_d = true;
        } else if let Some(v) = part.strip_prefix("THREADS=") {
            kernel.threads = number(v)?;
        } else if let Some(v) = part.strip_prefix("BLOCKS=") {
            kernel.blocks.push(match v.split_once(':') {
                Some((d, n)) => (Some(number(d)?), number(n)?),
                None => (None, number(v)?),
            });
        } else if let Some(v) = part.strip_prefix("SHARED=") {
            kernel.shared = Some(expression(v)?);
        } else if part == "HOT" {
            kernel.hot = true;
        } else if part == "WAITS" {
            kernel.waits = true;
        } else {
            return Err(format!(
                "unknown attribute {part}; write D=, THREADS=, BLOCKS=n, BLOCKS=D:n, SHARED=, HOT or WAITS"
            ));
        }
    }
    Ok(())
}

fn parameter(text: &str) -> Result<Param, String> {
    let Some((ty, name)) = text.rsplit_once([' ', '*']) else {
        return Err("expected a type and a name; write const real* x or int n".into());
    };
    if ty.trim() == "const tensor_map&" {
        return Ok(Param { name: name.to_string(), role: Role::Map, ty: Type::Real });
    }
    let pointer = text.contains('*');
    let ty = ty.trim().trim_end_matches('*').trim();
    let marked = |m: &str| {
        ty.strip_prefix(m).and_then(|r| r.strip_prefix('(')).and_then(|r| r.strip_suffix(')'))
    };
    let input = |t: &'_ str| t.starts_with("const ");
    let (role, inner) = if let Some(inner) = marked("MAYBE") {
        (if input(inner) { Role::MaybeIn } else { Role::MaybeOut }, inner)
    } else if let Some(inner) = marked("INOUT").or(marked("SCRATCH")) {
        (Role::Out, inner)
    } else if pointer {
        (if input(ty) { Role::In } else { Role::Out }, ty)
    } else {
        (Role::Scalar, ty)
    };
    let inner = inner.strip_prefix("const ").unwrap_or(inner).trim();
    let ty = Type::of(inner, role != Role::Scalar).ok_or_else(|| match role {
        Role::Scalar => {
            format!("a scalar of type {inner}; write int, unsigned, float or long long")
        }
        _ => {
            format!("a pointer to {inner}; write real, float, bf16, int, unsigned or unsigned char")
        }
    })?;
    if name.is_empty() || !name.chars().all(is_word) {
        return Err("expected a name after the type; write const real* x".into());
    }
    Ok(Param { name: name.to_string(), role, ty })
}

fn export(text: &str, before: &str) -> Result<Export, String> {
    let (keyword, inside, _) = call(text)?;
    let parts: Vec<&str> = top_level(inside).into_iter().map(str::trim).collect();
    let (name, fact) = match (keyword, &parts[..]) {
        ("EXPORT", [ty @ ("int" | "unsigned"), name, value]) => {
            (name, Fact::Constant { unsigned: *ty == "unsigned", value: expression(value)? })
        }
        ("EXPORT_FN", [name, param, body]) => {
            (name, Fact::Function { param: param.to_string(), body: expression(body)? })
        }
        ("EXPORT_ENUM", [name, members @ ..]) if !members.is_empty() => {
            (name, Fact::Numbers(members.iter().map(|m| m.to_string()).collect()))
        }
        _ => {
            return Err(format!(
                "{keyword}({inside}): write EXPORT(int or unsigned, NAME, value), \
                 EXPORT_FN(name, parameter, value) or EXPORT_ENUM(name, FIRST, SECOND)"
            ));
        }
    };
    if name.is_empty() || !name.chars().all(is_word) {
        return Err(format!("{keyword}: expected a name, not \"{name}\""));
    }
    Ok(Export { name: name.to_string(), fact, doc: doc_above(before) })
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// The position of the parenthesis that closes the one opened before `text`.
fn matching_paren(text: &str) -> Option<usize> {
    let mut depth = 1;
    for (i, c) in text.char_indices() {
        depth += i32::from(c == '(') - i32::from(c == ')');
        if depth == 0 {
            return Some(i);
        }
    }
    None
}

/// Splits at the commas outside parentheses.
fn top_level(text: &str) -> Vec<&str> {
    let (mut parts, mut depth, mut from) = (Vec::new(), 0, 0);
    for (i, c) in text.char_indices() {
        depth += i32::from(c == '(') - i32::from(c == ')');
        if c == ',' && depth == 0 {
            parts.push(&text[from..i]);
            from = i + 1;
        }
    }
    parts.push(&text[from..]);
    parts
}

fn without_comments(text: &str) -> String {
    text.lines().map(|l| l.split("//").next().unwrap_or("")).collect::<Vec<_>>().join(" ")
}

fn doc_above(text: &str) -> String {
    let lines: Vec<&str> = text.lines().rev().take_while(|l| l.starts_with("// ")).collect();
    lines.iter().rev().map(|l| l.trim_start_matches("// ")).collect::<Vec<_>>().join("\n")
}

// --- expressions ---

/// Binary operators by binding strength, the weakest first. Longer ones come before their prefixes.
const OPERATORS: [&[&str]; 6] =
    [&["||"], &["&&"], &["==", "!="], &["<=", ">=", "<", ">"], &["+", "-"], &["*", "/", "%"]];

fn expression(text: &str) -> Result<Expr, String> {
    let mut rest = text.trim();
    let value = choice(&mut rest)?;
    if rest.is_empty() { Ok(value) } else { Err(bad_expression(text, rest)) }
}

fn bad_expression(text: &str, at: &str) -> String {
    format!(
        "\"{text}\": cannot read \"{at}\"; write whole numbers, names, name(..), sizeof(real), \
         + - * / %, comparisons, && || and ? :"
    )
}

fn eat(rest: &mut &str, token: &str) -> bool {
    let found = rest.strip_prefix(token);
    *rest = found.map_or(*rest, str::trim_start);
    found.is_some()
}

fn choice(rest: &mut &str) -> Result<Expr, String> {
    let condition = binary(rest, 0)?;
    if !eat(rest, "?") {
        return Ok(condition);
    }
    let yes = choice(rest)?;
    if !eat(rest, ":") {
        return Err(bad_expression("? without :", rest));
    }
    Ok(Expr::Choose(Box::new(condition), Box::new(yes), Box::new(choice(rest)?)))
}

fn binary(rest: &mut &str, level: usize) -> Result<Expr, String> {
    let Some(operators) = OPERATORS.get(level) else { return primary(rest) };
    let mut left = binary(rest, level + 1)?;
    while let Some(op) = operators.iter().find(|op| eat(rest, op)) {
        left = Expr::Binary(op, Box::new(left), Box::new(binary(rest, level + 1)?));
    }
    Ok(left)
}

fn primary(rest: &mut &str) -> Result<Expr, String> {
    if eat(rest, "sizeof(real)") {
        return Ok(Expr::Name("sizeof(real)".into()));
    }
    if eat(rest, "(") {
        let inside = choice(rest)?;
        return if eat(rest, ")") { Ok(inside) } else { Err(bad_expression("(", rest)) };
    }
    let end = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
    let word = &rest[..end];
    *rest = rest[end..].trim_start();
    if word.starts_with(|c: char| c.is_ascii_digit()) {
        let digits = word.trim_end_matches('u');
        let number = match digits.strip_prefix("0x") {
            Some(hex) => i64::from_str_radix(hex, 16),
            None => digits.parse(),
        };
        return number.map(Expr::Number).map_err(|_| bad_expression(word, word));
    }
    if word.is_empty() {
        return Err(bad_expression("expression", rest));
    }
    if eat(rest, "(") {
        let argument = choice(rest)?;
        return match eat(rest, ")") {
            true => Ok(Expr::Call(word.into(), Box::new(argument))),
            false => Err(bad_expression(word, rest)),
        };
    }
    Ok(Expr::Name(word.into()))
}

impl Expr {
    /// The value of the expression; `variables` and `exports` define the names.
    pub fn value(&self, variables: &[(&str, i64)], exports: &[&Export]) -> Result<i64, String> {
        let find = |name: &str| exports.iter().find(|e| e.name == name).map(|e| &e.fact);
        match self {
            Expr::Number(n) => Ok(*n),
            Expr::Name(name) => match (variables.iter().find(|v| v.0 == name), find(name)) {
                (Some(v), _) => Ok(v.1),
                (None, Some(Fact::Constant { value, .. })) => value.value(&[], exports),
                _ => Err(format!("{name} is no exported constant; define it by EXPORT")),
            },
            Expr::Call(name, argument) => match find(name) {
                Some(Fact::Function { param, body }) => {
                    let argument = argument.value(variables, exports)?;
                    body.value(&[(param.as_str(), argument)], exports)
                }
                _ => Err(format!("{name} is no exported function; define it by EXPORT_FN")),
            },
            Expr::Binary(op, a, b) => {
                let (a, b) = (a.value(variables, exports)?, b.value(variables, exports)?);
                match *op {
                    "/" | "%" if b == 0 => Err("a division by 0".into()),
                    "/" => Ok(a / b),
                    "%" => Ok(a % b),
                    "*" => Ok(a * b),
                    "+" => Ok(a + b),
                    "-" => Ok(a - b),
                    "<" => Ok(i64::from(a < b)),
                    ">" => Ok(i64::from(a > b)),
                    "<=" => Ok(i64::from(a <= b)),
                    ">=" => Ok(i64::from(a >= b)),
                    "==" => Ok(i64::from(a == b)),
                    "!=" => Ok(i64::from(a != b)),
                    "&&" => Ok(i64::from(a != 0 && b != 0)),
                    _ => Ok(i64::from(a != 0 || b != 0)),
                }
            }
            Expr::Choose(condition, yes, no) => {
                let taken = if condition.value(variables, exports)? != 0 { yes } else { no };
                taken.value(variables, exports)
            }
        }
    }

    fn strength(&self) -> usize {
        match self {
            Expr::Binary(op, ..) => {
                OPERATORS.iter().position(|o| o.contains(op)).unwrap_or_default()
            }
            Expr::Choose(..) => 0,
            _ => OPERATORS.len(),
        }
    }
}

impl fmt::Display for Expr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Expr::Number(n) => write!(f, "{n}"),
            Expr::Name(name) => write!(f, "{name}"),
            Expr::Call(name, argument) => write!(f, "{name}({argument})"),
            Expr::Binary(op, a, b) => {
                let own = self.strength();
                let side = |e: &Expr, least: usize| {
                    if e.strength() < least { format!("({e})") } else { e.to_string() }
                };
                write!(f, "{} {op} {}", side(a, own), side(b, own + 1))
            }
            Expr::Choose(condition, yes, no) => {
                write!(f, "if {condition} {{ {yes} }} else {{ {no} }}")
            }
        }
    }
}
