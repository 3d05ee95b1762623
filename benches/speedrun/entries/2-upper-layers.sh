# Three quarters of the rows in steps of 8, and LoRA in the upper half of the layers only: the backward pass ends at layer 15.
head -n 456 "$3/sft.jsonl" > "$3/part.jsonl"
"$1" sft --model "$2" --data "$3/part.jsonl" --output "$4" seed="$5" use_peft=true lora_r=32 lora_alpha=64 lora_dropout=0 \
  lora_target_modules=all-linear layers_to_transform=15,16,17,18,19,20,21,22,23,24,25,26,27,28,29 \
  learning_rate=1.5e-3 lr_scheduler_type=cosine num_train_epochs=1 per_device_train_batch_size=8 max_length=128
