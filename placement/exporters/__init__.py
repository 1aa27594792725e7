"""Plans as the engines load them: one engine a file. Imports nothing, since every start of vLLM loads the plugin."""
