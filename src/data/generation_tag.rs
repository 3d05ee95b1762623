//! Rewrites `{% generation %}` blocks, which minijinja does not know, into blocks that leave
//! markers. Layer 6.
//!
//! Invariant: apart from the markers the rewritten template renders what Jinja2 renders, whitespace
//! control included.

/// The template variables that hold the markers at render time.
pub const OPEN: &str = "__temper_open";
pub const CLOSE: &str = "__temper_close";

/// The rewritten source, and how many generation blocks it has.
///
/// `{% generation %}` becomes `{% with %}{{ open }}{% set x = 0 %}` and its end `{% set x = 0 %}{{
/// close }}{% endwith %}`. The outer tags keep the `-` and `+` of the original and are themselves
/// blocks, so that the lexer trims around them as around the original; `with` gives the scope that
/// Jinja2's call block has.
pub fn rewrite(source: &str) -> (String, usize) {
    let mut out = String::with_capacity(source.len() + 64);
    let mut rest = source;
    let mut blocks = 0;
    while let Some(at) = rest.find('{') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let length = match rest.as_bytes().get(1) {
            Some(b'#') => rest.find("#}").map(|e| e + 2),
            Some(b'{') => tag_end(rest, "}}"),
            Some(b'%') => tag_end(rest, "%}"),
            _ => Some(1),
        };
        let Some(length) = length else { break }; // unclosed: minijinja reports it
        let tag = &rest[..length];
        rest = &rest[length..];
        let Some(block) = Block::parse(tag) else {
            out.push_str(tag);
            continue;
        };
        let (left, right) = (block.left, block.right);
        match block.name {
            "generation" => {
                blocks += 1;
                out.push_str(&format!(
                    "{{%{left} with %}}{{{{ {OPEN} }}}}{{% set __temper = 0 {right}%}}"
                ));
            }
            "endgeneration" => {
                out.push_str(&format!(
                    "{{%{left} set __temper = 0 %}}{{{{ {CLOSE} }}}}{{% endwith {right}%}}"
                ));
            }
            "raw" => {
                let raw = raw_end(rest).unwrap_or(rest.len());
                out.push_str(tag);
                out.push_str(&rest[..raw]);
                rest = &rest[raw..];
            }
            _ => out.push_str(tag),
        }
    }
    out.push_str(rest);
    (out, blocks)
}

/// A block tag without arguments.
struct Block<'a> {
    left: &'a str,  // "-", "+" or nothing
    name: &'a str,  // the words between
    right: &'a str, // "-", "+" or nothing
}

impl<'a> Block<'a> {
    fn parse(tag: &'a str) -> Option<Block<'a>> {
        let inside = tag.strip_prefix("{%")?.strip_suffix("%}")?;
        let left = if inside.starts_with(['-', '+']) { &inside[..1] } else { "" };
        let inside = &inside[left.len()..];
        let right = if inside.ends_with(['-', '+']) { &inside[inside.len() - 1..] } else { "" };
        Some(Block { left, name: inside[..inside.len() - right.len()].trim(), right })
    }
}

/// The length of the tag that `text` starts with: up to `close`, quoted strings skipped.
fn tag_end(text: &str, close: &str) -> Option<usize> {
    let bytes = text.as_bytes();
    let mut quote = None;
    let mut i = 2;
    while i < bytes.len() {
        match (quote, bytes[i]) {
            (Some(_), b'\\') => i += 1,
            (Some(q), b) if b == q => quote = None,
            (None, b @ (b'"' | b'\'')) => quote = Some(b),
            (None, _) if bytes[i..].starts_with(close.as_bytes()) => return Some(i + close.len()),
            _ => {}
        }
        i += 1;
    }
    None
}

/// Where the `{% endraw %}` tag starts.
fn raw_end(text: &str) -> Option<usize> {
    let mut from = 0;
    while let Some(at) = text[from..].find("{%") {
        let start = from + at;
        let end = start + text[start..].find("%}")? + 2;
        if Block::parse(&text[start..end]).is_some_and(|b| b.name == "endraw") {
            return Some(start);
        }
        from = start + 2;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_real_generation_tags_are_rewritten() {
        let (out, blocks) = rewrite("a{%- generation +%}b{%endgeneration-%}c");
        let open = "{%- with %}{{ __temper_open }}{% set __temper = 0 +%}";
        let close = "{% set __temper = 0 %}{{ __temper_close }}{% endwith -%}";
        assert_eq!((out, blocks), (format!("a{open}b{close}c"), 1));
        for source in [
            "{# {% generation %} #}{{ '{% generation %}' }}",
            "{% raw %}{% generation %}{% endgeneration %}{%- endraw -%}{ {% if x == \"%}{% generation %}\" %}",
            "{% generation",
            "{{ 'é' }} { {",
        ] {
            assert_eq!(rewrite(source), (source.to_string(), 0));
        }
    }
}
