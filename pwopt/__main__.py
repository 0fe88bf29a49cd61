from pwopt.cli import main

main()
