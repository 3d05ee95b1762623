mod model_folder;
