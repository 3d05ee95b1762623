//! The decoder against transformers 5.17, family by family, on the golden folders of
//! `tests/fixtures/models`.

use std::path::Path;
use std::sync::Arc;

use temper::autograd::Cx;
use temper::config::MatmulChoice;
use temper::device::{DType, cpu::Cpu};
use temper::model::batch::Sequence;
use temper::model::decoder::Decoder;

/// The largest difference of any token's log-prob from transformers'.
fn worst(case: &str, cx: &mut Cx) -> f64 {
    let dir = Path::new("tests/fixtures/models").join(case);
    let golden: serde_json::Value =
        serde_json::from_slice(&std::fs::read(dir.join("score.json")).unwrap()).unwrap();
    let decoder = Decoder::folder(&dir).unwrap().positions(128).build(cx).unwrap();
    let mut ids = Vec::new();
    let mut want = Vec::new();
    for row in golden["rows"].as_array().unwrap() {
        ids.push(
            row["input_ids"]
                .as_array()
                .unwrap()
                .iter()
                .map(|v| v.as_u64().unwrap() as u32)
                .collect::<Vec<_>>(),
        );
        want.push(
            row["logps"]
                .as_array()
                .unwrap()
                .iter()
                .map(|v| v.as_f64().unwrap())
                .collect::<Vec<_>>(),
        );
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
    assert!(cases.len() >= 12);
    let mut report = String::new();
    let mut largest = 0f64;
    for case in &cases {
        let mut cx = Cx::new(Arc::new(Cpu::new()), DType::F32).unwrap();
        let difference = worst(case, &mut cx);
        report += &format!("{case}: {difference:.2e}\n");
        largest = largest.max(difference);
    }
    println!("{report}");
    assert!(largest <= 5e-5, "log-probs differ from transformers by more than 5e-5:\n{report}");
}

#[test]
fn the_own_matmul_scores_as_the_library_does() {
    let mut cx = Cx::new(Arc::new(Cpu::new()), DType::F32).unwrap();
    cx.matmul = MatmulChoice::Own;
    assert!(worst("qwen3", &mut cx) <= 5e-5);
}
