"""`temper serve` under 64 clients, each with R requests one after the other, beside `temper generate` on the same prompts:

    python benches/peers/serve_load.py BINARY MODEL PROMPTS.jsonl TOKENS R ROUNDS

Greedy, on a CPU; the answers must be the same. Prints throughput and CPU seconds of both, and the ratios generate / serve.
"""
import tempfile
SCRATCH = tempfile.mkdtemp()
import os, resource, json, socket, subprocess, sys, time, threading
binary, model, data = sys.argv[1:4]; tokens, R, rounds = map(int, sys.argv[4:7])
C=64; n=C*R
rows=[json.loads(l) for l in open(data)]
prompts=[]
for r in rows:
    p=r.get("prompt")
    prompts.append(p if p is not None else r["text"][:24])
while len(prompts)<n: prompts=prompts+prompts
prompts=prompts[:n]
open(SCRATCH+"/p.jsonl","w").write("".join(json.dumps({"prompt":p})+"\n" for p in prompts))
def run(*a): subprocess.run([binary,"generate","--model",model,"--device","cpu",*a],check=True,stdout=subprocess.DEVNULL,stderr=subprocess.DEVNULL)
def gen():
    t=time.time(); run("--batch","64","--data",SCRATCH+"/p.jsonl","--output",SCRATCH+"/o.jsonl","temperature=0",f"max_new_tokens={tokens}")
    return time.time()-t,[json.loads(l) for l in open(SCRATCH+"/o.jsonl")]
def load():
    t=time.time(); run("--prompt","1","temperature=0","max_new_tokens=1"); return time.time()-t
srv=subprocess.Popen([binary,"serve",model,"--device","cpu","--port","0"],stdout=subprocess.PIPE,stderr=subprocess.DEVNULL,text=True)
url=srv.stdout.readline().split()[-1]; host,port=url.split("/")[2].split(":")
reqs=[]
for p in prompts:
    chat=isinstance(p,list)
    b=json.dumps({"temperature":0,"max_tokens":tokens,("messages" if chat else "prompt"):p}).encode()
    reqs.append(f"POST /v1/{'chat/' if chat else ''}completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(b)}\r\n\r\n".encode()+b)
def client(i,out):
    s=socket.create_connection((host,int(port)))
    for k in range(R):
        s.sendall(reqs[i+k*C]); buf=b""
        while b"\r\n\r\n" not in buf: buf+=s.recv(65536)
        head,body=buf.split(b"\r\n\r\n",1)
        want=int([l for l in head.lower().split(b"\r\n") if l.startswith(b"content-length")][0].split(b":")[1])
        while len(body)<want: body+=s.recv(65536)
        out[i+k*C]=body
def serve():
    out=[None]*n; t=time.time()
    ts=[threading.Thread(target=client,args=(i,out)) for i in range(C)]
    [x.start() for x in ts]; [x.join() for x in ts]
    w=time.time()-t
    return w,[json.loads(o) for o in out]
def ccpu():
    r=resource.getrusage(resource.RUSAGE_CHILDREN); return r.ru_utime+r.ru_stime
def scpu():
    f=open(f"/proc/{srv.pid}/stat").read().rsplit(")",1)[1].split(); return (int(f[11])+int(f[12]))/os.sysconf("SC_CLK_TCK")
ratios=[]; cpus=[]
for k in range(rounds):
    c0=ccpu(); g,out=gen(); c1=ccpu(); l=load(); c2=ccpu(); s0=scpu(); s,res=serve(); s1=scpu(); gc=(c1-c0)-(c2-c1); sc=s1-s0; cpus.append(gc/sc)
    text=lambda c: c["message"]["content"] if "message" in c else c["text"]
    same=all(o["completion"]==text(r["choices"][0]) for o,r in zip(out,res))
    tok=sum(len(o["completion_ids"]) for o in out); stok=sum(r["usage"]["completion_tokens"] for r in res)
    print(f"{tok} tokens: generate {g:.2f} s (load {l:.2f}), {tok/(g-l):.0f} tok/s; serve {s:.2f} s, {stok/s:.0f} tok/s; same answers {same}; wall ratio {(g-l)/s:.2f}, CPU s {gc:.2f} / {sc:.2f} = {gc/sc:.2f}, load counted {g/s:.2f}",flush=True)
    ratios.append((g-l)/s)
print("median CPU ratio", sorted(cpus)[len(cpus)//2]); print("median wall ratio",sorted(ratios)[len(ratios)//2])
srv.terminate(); print("exit",srv.wait())
