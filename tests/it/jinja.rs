//! Chat templates against Jinja2: each snippet renders the same text, or is an error.

use std::path::Path;
use std::time::Duration;

use serde_json::{Map, json};
use temper::data::chat::{ChatTemplate, RenderOptions};

fn render(source: &str) -> Result<String, String> {
    let messages = json!([
        { "role": "system", "content": "Be brief." }, { "role": "user", "content": "Hi" }
    ]);
    let template = ChatTemplate::new(source, Path::new("t"), &Map::new());
    template
        .and_then(|t| t.render(&messages, RenderOptions::default()))
        .map(|r| r.text)
        .map_err(|e| e.to_string())
}

#[test]
fn snippets_render_as_in_jinja2_or_are_an_error() {
    let text = std::fs::read_to_string("tests/fixtures/jinja.json").unwrap();
    let cases: Vec<(String, Option<String>)> = serde_json::from_str(&text).unwrap();
    let (mut same, mut refused, mut differ) = (0, Vec::new(), Vec::new());
    for (source, want) in &cases {
        match (render(source), want) {
            (Ok(got), Some(want)) if got == *want => same += 1,
            (Err(_), None) => same += 1,
            // docs/templates.md says why.
            (Err(e), Some(_)) if source == "{{ 10 ** 50 }}" => refused.push(e),
            (Err(e), Some(_)) => differ.push(format!("{source}\n   {e}")),
            (Ok(got), want) => differ.push(format!("{source}\n   {got:?} not {want:?}")),
        }
    }
    println!("{same} same, {} refused:\n{}", refused.len(), refused.join("\n"));
    assert!(refused.len() == 1 && refused[0].contains("**"), "{refused:?}");
    assert!(
        differ.is_empty(),
        "{} of {} differ:\n{}",
        differ.len(),
        cases.len(),
        differ.join("\n")
    );
}

/// Templates that mean harm: none may take long, take much memory, or end the process.
fn hostile() -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    for n in [5_000, 100_000] {
        for (open, close) in [("[", "]"), ("(", ")"), ("{1:", "}"), ("f(", ")"), ("x[", "]")] {
            all.push(format!("{{{{ {}1{} }}}}", open.repeat(n), close.repeat(n)));
        }
        for op in ["+", "-", "*", "~", "**", "==", "and", "or", "in", "//", "%", "<"] {
            all.push(format!("{{{{ 1{} }}}}", format!(" {op} 1").repeat(n)));
        }
        for sign in ["not ", "- ", "+ "] {
            all.push(format!("{{{{ {}1 }}}}", sign.repeat(n)));
        }
        for tail in [".a", "[0]", "()", "|upper", " if 1 else 1", " is odd"] {
            all.push(format!("{{{{ a{} }}}}", tail.repeat(n)));
        }
        for (open, close) in [
            ("{% if 1 %}", "{% endif %}"),
            ("{% for x in [1] %}", "{% endfor %}"),
            ("{% with %}", "{% endwith %}"),
            ("{% filter upper %}", "{% endfilter %}"),
            ("{% macro f() %}", "{% endmacro %}"),
            ("{% set x %}", "{% endset %}"),
        ] {
            all.push(format!("{}{}", open.repeat(n), close.repeat(n)));
        }
        all.push(format!("{{% if 1 %}}{}{{% endif %}}", "{% elif 1 %}".repeat(n)));
    }
    let grow = |step: &str, last: &str| {
        format!(
            "{{% set ns = namespace(a=[1], s='aaaaaaaa', d={{}}) %}}{{% for i in range(100000) %}}{step}{{% endfor %}}{last}"
        )
    };
    for step in [
        "{% set ns.a = [ns.a] %}",
        "{% set ns.a = [ns.a, ns.a] %}",
        "{% set ns.a = {'k': ns.a} %}",
        "{% set ns.a = (ns.a,) %}",
        "{% set ns.a = ns.a + ns.a %}",
        "{% set ns.a = namespace(x=ns.a) %}",
        "{% set ns.a = dict(x=ns.a) %}",
        "{% set ns.s = ns.s + ns.s %}",
        "{% set ns.s = ns.s ~ ns.s %}",
        "{% set ns.s = ns.s * 2 %}",
        "{% set ns.s = ns.s.replace('a', ns.s) %}",
        "{% set ns.s = ns.s.join([ns.s, ns.s]) %}",
        "{% set ns.s = ns.s|replace('a', ns.s) %}",
        "{% set ns.s = [ns.s, ns.s]|join(ns.s) %}",
        "{% set ns.s = ns.s.center(99999999) %}",
        "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}",
    ] {
        all.push(grow(step, "{{ ns.a }}{{ ns.s }}"));
    }
    for source in [
        "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}",
        "{% set ns = namespace() %}{% set a, ns.b = 1, ns %}{{ ns }}",
        "{% set ns = namespace() %}{% set b = namespace(x=ns) %}{% set ns.a = b %}{{ ns }}",
        "{% set ns = namespace() %}{% set c = cycler(ns) %}{% set ns.a = c %}{{ ns }}",
        "{% set ns = namespace() %}{% for i in [1] %}{% set ns.l = loop %}{% endfor %}{{ ns }}",
        "{% set ns = namespace(l=1) %}{% for i in range(99999) %}{% for j in [ns.l] %}{% set ns.l = loop %}{% endfor %}{% endfor %}{{ ns }}",
        "{% set ns = namespace(l=1) %}{% for i in range(99999) %}{% set ns.l|batch(3, ns.l)|list %}x{% endset %}{% endfor %}{{ ns }}",
        "{% set ns = namespace(l=1) %}{% for i in range(99999) %}{% set ns.l = cycler(ns.l) %}{% endfor %}{{ ns }}",
        "{% set ns = namespace(l=1) %}{% for i in range(99999) %}{% set ns.l = ns.l|list|map('upper') %}{% endfor %}{{ ns }}",
        "{% set a = range(99999)|list %}{% set b = range(99999)|list %}{% for i in range(99999) %}{% if a == b %}{% endif %}{% endfor %}",
        "{% set a = range(99999)|list %}{% for i in range(99999) %}{% if -1 in a %}{% endif %}{% endfor %}",
        "{% set a = range(99999)|list %}{% for i in range(99999) %}{% if a < a %}{% endif %}{% endfor %}",
        "{% set a = 'a' * 9999999 %}{% for i in range(99999) %}{% if 'b' in a %}{% endif %}{% endfor %}",
        "{% set a = 'a' * 9999999 %}{% for i in range(99999) %}{% if a == a ~ 'b' %}{% endif %}{% endfor %}",
        "{% set a = 'a' * 9999999 %}{% for i in range(99999) %}{{ a.count('b') }}{{ a.find('b') }}{% endfor %}",
        "{% set a = 'a' * 999999 %}{% for i in range(99999) %}{{ a.find('a' * 99999 ~ 'b') }}{% endfor %}",
        "{% macro f(x) %}{{ f([x]) }}{% endmacro %}{{ f(1) }}",
        "{% macro f(x) %}{% call f(x) %}{{ caller() }}{% endcall %}{% endmacro %}{{ f(1) }}",
        "{% macro f(x) %}{% filter upper %}{% for i in [1] %}{{ [f(x)]|map('upper')|list }}{% endfor %}{% endfilter %}{% endmacro %}{{ f(1) }}",
        "{% set ns = namespace() %}{% set ns.a = [ns] %}{{ ns.a|tojson }}",
        "{{ '{:>99999999999}'.format(1) }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ '{:.999999999f}'.format(1.0) }}",
        "{{ 'a' * 100000000000 }}",
        "{{ [1] * 100000000000 }}",
        "{{ ([1] * 100000000)|list }}",
        "{{ 'a'.ljust(9999999999) }}",
        "{{ 'a'.rjust(9999999999) }}",
        "{{ 'a'.zfill(9999999999) }}",
        "{{ 'a'.center(9999999999) }}",
        "{{ 'a'|indent(9999999999, true) }}",
        "{{ range(10000000000)|list }}",
        "{{ range(99999999)|sum }}",
        "{{ 9 ** 9 ** 9 ** 9 }}",
        "{{ [1]|batch(9999999999, 'x')|list }}",
        "{{ [1]|slice(9999999999)|list }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
    ] {
        all.push(source.to_string());
    }
    all
}

/// The stack of the thread: half of what a Rust thread has by default.
const STACK: usize = 1 << 20;

/// The CPU time of this thread.
fn cpu_time() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
}

#[test]
fn hostile_templates_end_in_an_error_in_time_and_memory() {
    let run = || {
        let (mut worst, mut fine, all) = ((Duration::ZERO, String::new()), Vec::new(), hostile());
        for source in &all {
            let before = cpu_time();
            let result = render(source);
            let head: String = source.chars().take(100).collect();
            if result.is_ok() {
                fine.push(head.clone());
            }
            worst = worst.max((cpu_time() - before, head));
        }
        println!("{} templates, worst {worst:?}, rendered: {fine:#?}", all.len());
        if let Ok(status) = std::fs::read_to_string("/proc/self/status") {
            println!("{}", status.lines().find(|l| l.starts_with("VmHWM")).unwrap_or_default());
        }
        // Two seconds of an optimised build; what bounds a template is its work, so other processes
        // do not count.
        assert!(worst.0 < Duration::from_secs(10), "{worst:?}");
        assert!(fine.is_empty(), "these rendered: {fine:#?}");
    };
    let thread = std::thread::Builder::new().stack_size(STACK).spawn(run).unwrap();
    thread.join().unwrap();
}

#[test]
fn a_conversation_of_twenty_megabytes_renders() {
    let template =
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content.strip() }}{% endfor %}";
    let template = ChatTemplate::new(template, Path::new("t"), &Map::new()).unwrap();
    let message = json!({ "role": "user", "content": "word ".repeat(1000) });
    let messages = serde_json::Value::Array(vec![message; 4000]);
    let text = template.render(&messages, RenderOptions::default()).unwrap().text;
    assert_eq!(text.len(), 4000 * (6 + 4999));
}
