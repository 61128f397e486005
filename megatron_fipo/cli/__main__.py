from megatron_fipo.cli.main import main

main()
