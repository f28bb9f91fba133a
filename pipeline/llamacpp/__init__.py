"""The pinned llama.cpp: its programs, its library, and the GGUF files that they read and write."""
