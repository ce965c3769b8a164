import importlib, itertools, sys, time, torch, statistics as S
import triton
G=importlib.import_module("duomoe.kernels.grouped_gemm");V=importlib.import_module("duomoe.kernels.expert_gemv")
A=importlib.import_module("duomoe.kernels.attention");P=importlib.import_module("duomoe.kernels.permute")
import duomoe.kernels as K
WARM="--warm" in sys.argv
T0=time.time()
dev=torch.device("cuda");bf=torch.bfloat16
def bench(calls,reps=6):
    for c in calls[:1]: c()
    if WARM: return 1.0
    torch.cuda.synchronize()
    g=torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        for c in calls: c()
    ts=[]
    for i in range(reps+2):
        a,b=torch.cuda.Event(enable_timing=True),torch.cuda.Event(enable_timing=True)
        a.record();g.replay();b.record();b.synchronize()
        if i>1: ts.append(a.elapsed_time(b)/1e3/len(calls))
    return S.median(ts)
def rnd(*s,scale=1.0): return torch.empty(s,dtype=bf,device=dev).normal_(0,scale)
def show(*a): 
    if not WARM: print("%5.0fs"%(time.time()-T0),*a,flush=True)
show(torch.cuda.get_device_name(),torch.__version__,triton.__version__)
if not WARM:
    s=torch.empty(1<<30,dtype=torch.uint8,device=dev).random_();d=torch.empty_like(s);t=bench([lambda:d.copy_(s)]);show("copy GB/s",2*s.nbytes/1e9/t)
    t=bench([lambda: s.view(torch.int64).sum()]);show("sum-read GB/s",s.nbytes/1e9/t);del s,d
    a=rnd(8192,8192);b=rnd(8192,8192);o=torch.empty_like(a);t=bench([lambda:torch.mm(a,b.T,out=o)]);show("cublas 8192^3 TFLOPs",2*8192**3/t/1e12);del a,b,o
MODELS={"mixtral":(4096,14336,8,2),"qwen3":(2048,768,128,8)}
import os
ONLY=os.environ.get("ONLY","mixtral,qwen3,rest").split(",")
for name,(H,I,E,k) in MODELS.items():
    if name not in ONLY: continue
    wg=rnd(E,2*I,H,scale=H**-.5);wd=rnd(E,H,I,scale=I**-.5);slots=torch.arange(E,dtype=torch.int32,device=dev)
    es=list(slots.view(-1,1,k));x=rnd(1,H);w=torch.rand(1,k,device=dev)
    base=(V.BLOCK_N,V.PART_UNIT,V.NUM_WARPS,V.FULL)
    best=[]
    for bn,bk,nw in [(16,256,4),(8,256,4),(8,512,4),(4,512,4),(32,256,4),(32,256,8),(16,512,8),(16,512,4),(8,1024,8),(4,1024,4),(16,128,4),(8,256,2),(4,512,2),(2,1024,4)]:
        for full in (512,1024,2048,4096):
            V.BLOCK_N,V.PART_UNIT,V.NUM_WARPS,V.FULL=bn,bk,nw,full
            s1=V.gemv_splits(H,2*I,k);s2=V.gemv_splits(I,H,k)
            if (bn,bk,nw,s1,s2) in [b[0] for b in best]: continue
            gu=torch.zeros(s1,k,2*I,device=dev);y=torch.zeros(s2,k,H,device=dev)
            t1=bench([lambda e=e:V.experts_gate_up_gemv_triton(x,wg,slots,e,gu) for e in es])
            t2=bench([lambda e=e:V.experts_down_gemv_triton(gu,wd,slots,e,w,y) for e in es])
            best.append(((bn,bk,nw,s1,s2),k*2*I*H*2/t1/1e9,k*I*H*2/t2/1e9,t1*1e6,t2*1e6))
    for b in best: show(name,"gemv BN,BK,warps,s1,s2=%s gate_up %.0f GB/s down %.0f GB/s  %.1f %.1f us"%b)
    V.BLOCK_N,V.PART_UNIT,V.NUM_WARPS,V.FULL=base
    # gemv against gemm by token count
    for T in (1,2,4,8,16,32,64):
        ee=torch.rand(4,T,E,device=dev).argsort(-1)[:,:,:k].to(torch.int32);xx=rnd(T,H);ww=torch.rand(T,k,device=dev);p=T*k
        s1=V.gemv_splits(H,2*I,p);s2=V.gemv_splits(I,H,p);gu=torch.zeros(s1,p,2*I,device=dev);y=torch.zeros(s2,p,H,device=dev)
        def gemv(e):
            V.experts_gate_up_gemv_triton(xx,wg,slots,e,gu);V.experts_down_gemv_triton(gu,wd,slots,e,ww,y);K.combine(y,e,bf)
        h=torch.zeros(p,I,dtype=bf,device=dev);z=torch.zeros(p,H,dtype=bf,device=dev)
        def gemm(e):
            o,off=P.group_by_expert_triton(e,E);G.experts_gate_up_triton(xx,wg,slots,o,off,k,h);G.experts_down_triton(h,wd,slots,o,off,ww,z);K.combine(z[None],e,bf)
        e0=list(ee)
        show(name,"T=%d gemv %.1f us gemm %.1f us"%(T,bench([lambda e=e:gemv(e) for e in e0])*1e6 if p<=128 else -1,bench([lambda e=e:gemm(e) for e in e0])*1e6))
    opt=G._options
    for T in ((4096,16384) if name=="qwen3" else (2048,8192)) + (256,):
        e=torch.rand(T,E,device=dev).argsort(-1)[:,:k].to(torch.int32);o,off=P.group_by_expert_triton(e,E);p=T*k
        xx=rnd(T,H);ww=torch.rand(T,k,device=dev);h=rnd(p,I);z=torch.zeros(p,H,dtype=bf,device=dev)
        if not WARM:
            a=rnd(p,H);b=rnd(2*I,H);c=torch.empty(p,2*I,dtype=bf,device=dev);t1=bench([lambda:torch.mm(a,b.T,out=c)]);del c
            b2=rnd(H,I);c2=torch.empty(p,H,dtype=bf,device=dev);t2=bench([lambda:torch.mm(h,b2.T,out=c2)])
            show(name,T,"cublas dense TFLOPs gate_up %.0f down %.0f"%(4*p*H*I/t1/1e12,2*p*H*I/t2/1e12)); del a,b,b2,c2
        if T==256: cs=[(None,)*5]+[(16,128,64,4,4),(16,128,128,4,3),(16,64,128,4,4),(32,128,64,4,4),(32,128,128,4,3),(64,128,64,4,4),(64,256,64,4,3),(64,256,64,8,3),(64,256,64,8,4)]
        else: cs=[(None,)*5]+[(128,256,64,8,3),(128,256,64,8,4),(128,128,64,8,4),(128,128,64,4,3),(128,128,64,4,4),(256,128,64,8,3),(128,256,32,8,4),(64,256,64,4,4),(64,128,64,4,4)]
        for bm,wid,bk,nw,st in cs:
          for gm in ((8,4,16,32) if (bm,wid,nw,st)==(128,256,8,3) else (8,)):
            def f(pairs,n,inner,m,dt,cap):
                d=opt(pairs,n,inner,m,dt,cap)
                if bm: d|={"BLOCK_M":bm,"BLOCK_N":wid//m,"BLOCK_K":bk,"num_warps":nw,"num_stages":st,"GROUP_M":gm,"EVEN_K":inner%bk==0}
                return d
            G._options=f
            occ=G.multiprocessors(dev)
            try:
                t1=bench([lambda:G.experts_gate_up_triton(xx,wg,slots,o,off,k,h)],4);t2=bench([lambda:G.experts_down_triton(h,wd,slots,o,off,ww,z)],4)
                show(name,T,"BM,W,BK,warps,stages,GM=%s gate_up %.0f TFLOPs (%.0f GB/s) down %.0f (%.0f)"%((bm,wid,bk,nw,st,gm),4*p*H*I/t1/1e12,wg.nbytes/t1/1e9,2*p*H*I/t2/1e12,wd.nbytes/t2/1e9))
            except Exception as ex: show(name,T,(bm,wid,bk,nw,st,gm),repr(ex)[:100])
        G._options=opt
        # one wave of few experts
        one=torch.full_like(slots,-1);n=max(E//16,1);one[:n]=slots[:n]
        t1=bench([lambda:G.experts_gate_up_triton(xx,wg,one,o,off,k,h)]);none=torch.full_like(slots,-1);t0=bench([lambda:G.experts_gate_up_triton(xx,wg,none,o,off,k,h)])
        show(name,T,"wave of %d experts: gate_up %.1f us; of none %.1f us"%(n,t1*1e6,t0*1e6))
    del wg,wd
if "rest" not in ONLY: sys.exit()
for s,c in ((1,4096),(1,32768),(16,8192)):
    ps=16;n=c//ps;kv=rnd(8,2,s*n,ps,4,128);tab=torch.randperm(s*n,device=dev).view(s,n).to(torch.int32);q=rnd(s,32,128)
    qs=torch.arange(s+1,dtype=torch.int32,device=dev);cl=torch.full((s,),c,dtype=torch.int32,device=dev)
    for ch,w,st in ((128,4,2),(64,4,2),(256,4,2),(256,4,3),(128,8,2),(128,2,2)):
        A.CHUNK=ch;od=A._decode_options
        A._decode_options=lambda *a:od(*a)|{"num_warps":w,"num_stages":st}
        t=bench([lambda l=l:A.paged_attention_triton(q,l[0],l[1],tab,qs,cl,1,128**-.5,0) for l in kv]);A._decode_options=od
        show("paged decode",s,c,"CHUNK,warps,stages",(ch,w,st),"%.1f us %.0f GB/s"%(t*1e6,kv[0].nbytes/t/1e9))
    del kv
A.CHUNK=128
for T in (2048,8192):
    q=rnd(T,32,128);kp=rnd(T//16,16,4,128);vp=rnd(T//16,16,4,128);tab=torch.arange(T//16,device=dev,dtype=torch.int32)[None]
    qs=torch.tensor([0,T],dtype=torch.int32,device=dev);cl=torch.tensor([T],dtype=torch.int32,device=dev);op=A._prefill_options
    for bm,bn,w,st in ((128,64,8,2),(128,64,4,2),(64,64,4,2),(64,64,4,3),(128,128,8,2),(128,64,8,3),(128,32,4,3)):
        A._prefill_options=lambda *a:op(*a)|{"BLOCK_M":bm,"BLOCK_N":bn,"num_warps":w,"num_stages":st}
        t=bench([lambda:A.paged_attention_triton(q,kp,vp,tab,qs,cl,T,128**-.5,0)]);A._prefill_options=op
        show("prefill attention",T,(bm,bn,w,st),"%.0f TFLOPs"%(2*T*T*32*128/t/1e12))
    if not WARM:
        qq=q.transpose(0,1)[None];kk=kp.view(T,4,128).transpose(0,1)[None];vv=vp.view(T,4,128).transpose(0,1)[None]
        t=bench([lambda:torch.nn.functional.scaled_dot_product_attention(qq,kk,vv,is_causal=True,enable_gqa=True)]);show("SDPA",T,"%.0f TFLOPs"%(2*T*T*32*128/t/1e12))
for T in (1,8192):
    x=rnd(T,2048);w=rnd(2048);t1=bench([lambda:K.add_rms_norm(x,x,w,1e-6)]*4)
    lg=rnd(T,128);t2=bench([lambda:K.route(lg,8,True)]*4);e=K.route(lg,8,True)[1];t3=bench([lambda:K.group_by_expert(e,128)]*4)
    y=rnd(1,T*8,2048);t4=bench([lambda:K.combine(y,e,bf)]*4)
    qkv=rnd(T,40*128);cs=torch.rand(T,64,device=dev);kp=torch.zeros(T,1,4,128,dtype=bf,device=dev);rows=torch.arange(T,device=dev);nw=rnd(128)
    t5=bench([lambda:K.rope_and_cache(qkv,cs,cs,kp,kp.clone() if False else kp,rows,nw,nw,1e-6)]*4) if False else bench([lambda vp=kp.clone():K.rope_and_cache(qkv,cs,cs,kp,vp,rows,nw,nw,1e-6)]*4)
    show("T=%d us: add_rms_norm %.1f route %.1f group %.1f combine %.1f rope %.1f"%((T,)+tuple(t*1e6 for t in (t1,t2,t3,t4,t5))))
show("done")
