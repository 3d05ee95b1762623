//! The decoder against transformers 5.17, family by family, on the golden folders of
//! `tests/fixtures/models`.

use temper::autograd::Cx;
use temper::config::MatmulChoice;
use temper::model::batch::Sequence;

use crate::support::{self, cpu, decoder, floats, golden, json};

/// The largest difference of any token's log-prob from transformers'.
fn worst(case: &str, cx: &mut Cx) -> f64 {
    let dir = golden(case);
    let golden = json(dir.join("score.json"));
    let decoder = decoder(cx, &dir, 128);
    let mut ids = Vec::new();
    let mut want = Vec::new();
    for row in golden["rows"].as_array().unwrap() {
        ids.push(support::ids(&row["input_ids"]));
        want.push(floats(&row["logps"]));
    }
    let sequences: Vec<Sequence> = ids.iter().map(|ids| Sequence { ids, target: None }).collect();
    let got = decoder.logps(cx, &sequences).unwrap();
    let mut worst = 0f64;
    for (g, w) in got.iter().zip(&want) {
        assert_eq!(g.len(), w.len());
        worst = g.iter().zip(w).fold(worst, |m, (a, b)| m.max((f64::from(*a) - b).abs()));
    }
    worst
}

#[test]
fn every_family_scores_as_transformers_does() {
    let mut cases: Vec<String> = std::fs::read_dir("tests/fixtures/models")
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    cases.sort();
    assert!(cases.len() >= 22);
    let mut report = String::new();
    let mut largest = 0f64;
    for case in &cases {
        let mut cx = cpu();
        let difference = worst(case, &mut cx);
        report += &format!("{case}: {difference:.2e}\n");
        largest = largest.max(difference);
    }
    println!("{report}");
    assert!(largest <= 5e-5, "log-probs differ from transformers by more than 5e-5:\n{report}");
}

#[test]
fn the_own_matmul_scores_as_the_library_does() {
    let mut cx = cpu();
    cx.matmul = MatmulChoice::Own;
    assert!(worst("qwen3", &mut cx) <= 5e-5);
}
