//! Translates chat templates to minijinja. Layer 6.
//!
//! Invariant: a template that Jinja2 accepts means the same here, or is an error.

pub mod emit;
pub mod filters;
pub mod lexer;
pub mod operators;
pub mod percent;
pub mod python;
pub mod remainder;
pub mod rewrite;

/// Python's whitespace (`str.isspace`).
pub fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\u{1C}'..='\u{1F}')
}
