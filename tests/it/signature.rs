//! The parser of kernel signatures (`build/signature.rs`), on valid and invalid input.

#[path = "../../build/signature.rs"]
mod parser;

use parser::{Expr, Fact, Kernel, Kind, Param, Role, Source, Type, parse};

fn good(text: &str) -> Source {
    parse("x.cu", text).unwrap()
}

/// The one error of a file whose third line is wrong.
fn error(line: &str) -> String {
    let errors = parse("x.cu", &format!("// a head\n\n{line}\n")).unwrap_err();
    assert_eq!(errors.len(), 1, "{errors:?}");
    assert!(errors[0].starts_with("x.cu:3: "), "{}", errors[0]);
    errors[0]["x.cu:3: ".len()..].to_string()
}

fn says(line: &str, parts: &[&str]) {
    let error = error(line);
    for part in parts {
        assert!(error.contains(part), "\"{part}\" is missing in: {error}");
    }
}

fn param(name: &str, role: Role, ty: Type) -> Param {
    Param { name: name.into(), role, ty }
}

#[test]
fn a_signature_is_read_with_its_attributes_parameters_and_comment() {
    let text = "// A mention of KERNEL(nothing) is no kernel.\n\n// The first line.\n// The second.\n\
        KERNEL(f, D=16,32, THREADS=128, BLOCKS=32:5, SHARED=2 * D, HOT, WAITS)(real* y, MAYBE(float) lse, const real* x,\n    \
        MAYBE(const unsigned char) c, // a comment, with a comma\n    INOUT(float) m, SCRATCH(int) s, long long n, float eps) {\n}\n";
    let params = vec![
        param("y", Role::Out, Type::Real),
        param("lse", Role::MaybeOut, Type::Float),
        param("x", Role::In, Type::Real),
        param("c", Role::MaybeIn, Type::Byte),
        param("m", Role::Out, Type::Float),
        param("s", Role::Out, Type::Int),
        param("n", Role::Scalar, Type::Long),
        param("eps", Role::Scalar, Type::Float),
    ];
    let shared = Expr::Binary("*", Box::new(Expr::Number(2)), Box::new(Expr::Name("D".into())));
    let kernel = Kernel {
        name: "f".into(),
        kind: Kind::Fiber,
        d: vec![16, 32],
        threads: 128,
        blocks: vec![(Some(32), 5)],
        shared: Some(shared),
        hot: true,
        waits: true,
        params,
        doc: "The first line.\nThe second.".into(),
    };
    assert_eq!(good(text), Source { kernels: vec![kernel], exports: vec![] });
}

#[test]
fn the_three_kinds_are_told_apart_and_defaults_are_filled_in() {
    let source =
        good("KERNEL_FLAT(a)(int* y) {}\nKERNEL_WARP(b)(int* y) {}\nKERNEL(c)(int* y) {}\n");
    let kinds: Vec<Kind> = source.kernels.iter().map(|k| k.kind).collect();
    assert_eq!(kinds, [Kind::Flat, Kind::Warp, Kind::Fiber]);
    let first = &source.kernels[0];
    assert_eq!((first.threads, first.hot, first.waits, first.d.len()), (256, false, false, 0));
}

#[test]
fn exports_are_read_and_evaluated_as_c_does() {
    let source = good(
        "// Rows.\nEXPORT(int, ROWS, 2 + 3 * 4 - 1);\nEXPORT(unsigned, TAG, 0x02000000u);\n\
         EXPORT_FN(step, d, d > 80 || d == 32 ? 32 : d <= 16 ? 8 : 64);\n\
         EXPORT_FN(bytes, d, 2 * (ROWS + step(d)) * (d + 8) / 2);\nEXPORT_ENUM(loss, A,\n  B);\n",
    );
    assert_eq!(source.exports[0].doc, "Rows.");
    assert_eq!(source.exports[4].fact, Fact::Numbers(vec!["A".into(), "B".into()]));
    let Fact::Constant { unsigned: true, value } = &source.exports[1].fact else {
        panic!("{:?}", source.exports[1]);
    };
    assert_eq!(*value, Expr::Number(0x0200_0000));
    let exports: Vec<_> = source.exports.iter().collect();
    let bytes = Expr::Call("bytes".into(), Box::new(Expr::Name("D".into())));
    for (d, step) in [(16, 8), (32, 32), (64, 64), (80, 64), (96, 32)] {
        let want = 2 * (13 + step) * (d + 8) / 2;
        assert_eq!(bytes.value(&[("D", d)], &exports), Ok(want), "{d}");
    }
    let unknown = Expr::Name("COLS".into()).value(&[], &exports).unwrap_err();
    assert!(unknown.contains("COLS is no exported constant"), "{unknown}");
    let unknown = Expr::Call("ROWS".into(), Box::new(Expr::Number(1))).value(&[], &exports);
    assert!(unknown.unwrap_err().contains("EXPORT_FN"));
}

#[test]
fn expressions_are_written_in_rust_with_the_same_meaning() {
    let rust = |text: &str| match &good(&format!("EXPORT_FN(f, d, {text});")).exports[0].fact {
        Fact::Function { param, body } => (param.clone(), body.to_string()),
        other => panic!("{other:?}"),
    };
    for (c, want) in [
        ("d <= 128 ? 64 : 32", "if d <= 128 { 64 } else { 32 }"),
        ("2 * (64 + step(d)) * (d + 8)", "2 * (64 + step(d)) * (d + 8)"),
        ("d - (3 - 1) - 1", "d - (3 - 1) - 1"),
        ("(d > 1 ? 2 : 3) + 1", "(if d > 1 { 2 } else { 3 }) + 1"),
    ] {
        assert_eq!(rust(c), ("d".to_string(), want.to_string()));
    }
}

#[test]
fn a_malformed_signature_names_what_is_missing() {
    says("KERNEL_SLOW(f)(int n) {", &["KERNEL_SLOW is no kind", "KERNEL_FLAT"]);
    says("KERNEL f(int n) {", &["expected an opening parenthesis"]);
    says("KERNEL(f, D=1\nvoid g() {", &["KERNEL is not closed"]);
    says("KERNEL(f) {", &["expected the parameters of f", "KERNEL(f)(const real* x, int n)"]);
    says("KERNEL(f)(int n {\n  g(n);\n}", &["the parameters of f are not closed"]);
}

#[test]
fn a_bad_attribute_is_shown_with_those_that_exist() {
    says("KERNEL(f, FAST)(int n) {", &["unknown attribute FAST", "THREADS=", "BLOCKS=D:n", "HOT"]);
    says("KERNEL(, HOT)(int n) {", &["the kernel's name first"]);
    says("KERNEL(f, D=sixteen)(int n) {", &["\"sixteen\"", "D=64,128"]);
    says("KERNEL(f, D=16,x)(int n) {", &["\"x\"", "D=64,128"]);
    says("KERNEL(f, THREADS=many)(int n) {", &["THREADS=many", "whole number"]);
    says("KERNEL(f, BLOCKS=x)(int n) {", &["BLOCKS=x", "not \"x\""]);
    says("KERNEL(f, BLOCKS=a:5)(int n) {", &["not \"a\""]);
    says("KERNEL(f, SHARED=2 *)(int n) {", &["cannot read"]);
    says("KERNEL(f, SHARED=(2)(int n) {", &["not closed"]);
}

#[test]
fn a_bad_parameter_is_shown_with_the_types_that_exist() {
    says("KERNEL(f)(int) {", &["parameter \"int\" of f", "a type and a name"]);
    says("KERNEL(f)(double x) {", &["a scalar of type double", "long long"]);
    says("KERNEL(f)(real x) {", &["a scalar of type real"]);
    says("KERNEL(f)(const double* x) {", &["a pointer to double", "unsigned char"]);
    says("KERNEL(f)(MAYBE(const half) x) {", &["a pointer to half"]);
    says("KERNEL(f)(long long* x) {", &["a pointer to long long"]);
    says("KERNEL(f)(int a[3]) {", &["expected a name"]);
}

#[test]
fn a_bad_export_shows_the_three_forms() {
    says("EXPORT(double, X, 1);", &["EXPORT(int or unsigned, NAME, value)"]);
    says("EXPORT(int, X);", &["EXPORT_FN(name, parameter, value)"]);
    says("EXPORT_ENUM(loss);", &["EXPORT_ENUM(name, FIRST, SECOND)"]);
    says("EXPORT_STRUCT(a, b);", &["EXPORT_STRUCT(a, b): write"]);
    says("EXPORT(int, a b, 1);", &["expected a name, not \"a b\""]);
    says("EXPORT(int, X, 1 ? 2);", &["? without :"]);
    says("EXPORT(int, X, 3 ^ 4);", &["cannot read \"^ 4\""]);
    says("EXPORT(int, X, 12ab);", &["cannot read \"12ab\""]);
}

#[test]
fn all_errors_of_a_file_are_reported_at_once() {
    let text = "KERNEL(a, FAST)(int n) {}\n\nKERNEL(b)(double x) {}\nEXPORT(int);\n";
    let errors = parse("kernels/x.cu", text).unwrap_err();
    let places: Vec<&str> = errors.iter().map(|e| e.split(": ").next().unwrap()).collect();
    assert_eq!(places, ["kernels/x.cu:1", "kernels/x.cu:3", "kernels/x.cu:4"]);
}

#[test]
fn a_tensor_map_is_a_parameter_by_value() {
    let source = good("KERNEL(f)(const tensor_map& a, INOUT(float) y, int n) {\n}\n");
    let want = [
        param("a", Role::Map, Type::Real),
        param("y", Role::Out, Type::Float),
        param("n", Role::Scalar, Type::Int),
    ];
    assert_eq!(source.kernels[0].params, want);
}
