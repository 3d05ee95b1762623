//! Comparisons that several families share: log-probs of transformers, losses of TRL, adapter folders
//! of PEFT.

use std::path::{Path, PathBuf};

use serde_json::Value;
use temper::autograd::Cx;
use temper::methods::offline::sft::{Sft, SftRun};
use temper::model::adapter::{Adapter, folder as adapter_folder};
use temper::model::batch::Sequence;
use temper::model::decoder::Decoder;
use temper::tensor::safetensors::SafeFolder;
use temper::train::Trainer;

use crate::support::{self, cpu, decoder, floats, golden, ids, words};

pub fn relative(a: f64, b: f64) -> f64 {
    (a - b).abs() / b.abs().max(1e-12)
}

/// The largest differences over 20 steps on the rows of sft/text.jsonl: of losses and of gradient
/// norms.
pub fn trained_as(cx: Cx, model: Decoder, keys: &str, want: &Value) -> (f64, f64) {
    let keys = format!(
        "{keys} per_device_train_batch_size=4 max_steps=20 train_sampling_strategy=sequential \
         lr_scheduler_type=linear"
    );
    let (run, _) = SftRun::load(None, &words(&keys)).unwrap();
    let rows = support::rows("sft/text.jsonl");
    let (mut sft, _) =
        support::with_inputs(&model.config, &rows, |i| Sft::new(&run.method, i).unwrap());
    let count = temper::methods::Method::rows(&sft);
    let mut trainer = Trainer::new(cx, model, run.training, count).unwrap();
    let (mut loss, mut norm) = (0f64, 0f64);
    for i in 0..20 {
        let step = trainer.step(&mut sft).unwrap();
        let of = |key: &str| want[key][i].as_f64().unwrap();
        loss = loss.max(relative(f64::from(step.loss), of("loss")));
        norm = norm.max(relative(f64::from(step.grad_norm), of("grad_norm")));
    }
    (loss, norm)
}

/// The largest difference of a model's log-probs from a score.json's.
pub fn difference(cx: &mut Cx, model: &Decoder, score: &Value) -> f64 {
    let rows = score["rows"].as_array().unwrap();
    let all: Vec<Vec<u32>> = rows.iter().map(|r| ids(&r["input_ids"])).collect();
    let sequences: Vec<Sequence> = all.iter().map(|ids| Sequence { ids, target: None }).collect();
    let got = model.logps(cx, &sequences).unwrap().concat();
    let want: Vec<f64> = rows.iter().flat_map(|row| floats(&row["logps"])).collect();
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max)
}

/// An adapter that PEFT made for the golden folder `base`: its log-probs, the folder that temper
/// writes of it, and 20 steps of training. Returns the names of its tensors.
pub fn adapter_is_pefts(case: &str, dir: &Path, base: &str, want: &Value) -> Vec<String> {
    let mut cx = cpu();
    let base = decoder(&cx, golden(base), 240);
    let adapter = Adapter::load(&cx, dir, &base.config, &base.params).unwrap();
    let mut model = base.with_adapter(Some(adapter)).unwrap();
    let start = difference(&mut cx, &model, &want["start"]);
    assert!(start <= 5e-5, "{case}: log-probs at the start {start:.1e}");

    // What is saved is what PEFT saved.
    let adapter = model.adapter.as_ref().unwrap();
    let out = tempfile::tempdir().unwrap();
    let written = match std::env::var_os("TEMPER_SAVED") {
        Some(root) => PathBuf::from(root).join(case), // for make_fused_peft.py --load
        None => out.path().join(case),
    };
    adapter_folder::write(&written, adapter, &[], &mut |i| adapter.params.weight_view(i)?.to_f32())
        .unwrap();
    let file = |dir: &Path| SafeFolder::open_file(dir.join("adapter_model.safetensors")).unwrap();
    let (theirs, ours) = (file(dir), file(&written));
    assert_eq!(ours.names().collect::<Vec<_>>(), theirs.names().collect::<Vec<_>>(), "{case}");
    for name in theirs.names() {
        let (a, b) = (theirs.get(name).unwrap(), ours.get(name).unwrap());
        assert_eq!((a.shape, a.bytes), (b.shape, b.bytes), "{case}: {name}");
    }

    model.adapter.as_mut().unwrap().tune(None).unwrap();
    let (loss, norm) = trained_as(cx, model, "use_peft=true learning_rate=1e-2", want);
    println!("{case}: start {start:.1e}, loss {loss:.1e}, grad_norm {norm:.1e}");
    assert!(loss <= 1e-5 && norm <= 1e-4, "{case}: loss {loss:.1e}, grad_norm {norm:.1e}");
    theirs.names().map(|name| name.to_string()).collect()
}
