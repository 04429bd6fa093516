module stepwire.example/client

go 1.19
