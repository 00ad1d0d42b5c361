#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>

// A CUDA runtime without a device: eight H100s that can be asked about and hold memory on the host; every launch succeeds and does nothing.
static __thread int cur = 0;
#if CUDART_VERSION >= 13000
#define PROPERTIES cudaGetDeviceProperties
#else
#define PROPERTIES cudaGetDeviceProperties_v2
#endif
#define R cudaError_t
R cudaGetDeviceCount(int*n){*n=8;return 0;}
R cudaGetDevice(int*d){*d=cur;return 0;}
R cudaSetDevice(int d){cur=d;return 0;}
R cudaDriverGetVersion(int*v){*v=CUDART_VERSION;return 0;}
R cudaRuntimeGetVersion(int*v){*v=CUDART_VERSION;return 0;}
R PROPERTIES(struct cudaDeviceProp*p,int d){memset(p,0,sizeof *p);strcpy(p->name,"NVIDIA H100 80GB HBM3 (stub)");p->totalGlobalMem=80UL<<30;p->sharedMemPerBlock=49152;p->regsPerBlock=65536;p->warpSize=32;p->maxThreadsPerBlock=1024;p->maxThreadsDim[0]=p->maxThreadsDim[1]=1024;p->maxThreadsDim[2]=64;p->maxGridSize[0]=2147483647;p->maxGridSize[1]=p->maxGridSize[2]=65535;p->major=9;p->minor=0;p->multiProcessorCount=132;p->maxThreadsPerMultiProcessor=2048;p->sharedMemPerMultiprocessor=233472;p->l2CacheSize=52428800;p->sharedMemPerBlockOptin=232448;return 0;}
R cudaDeviceGetStreamPriorityRange(int*a,int*b){if(a)*a=0;if(b)*b=-5;return 0;}
R cudaDeviceCanAccessPeer(int*a,int b,int c){*a=1;return 0;}
R cudaMalloc(void**p,size_t n){*p=aligned_alloc(512,(n+511)/512*512);return *p?0:2;}
R cudaFree(void*p){free(p);return 0;}
R cudaMallocAsync(void**p,size_t n,cudaStream_t s){return cudaMalloc(p,n);}
R cudaFreeAsync(void*p,cudaStream_t s){free(p);return 0;}
// Pinned memory is remembered, so that torch can tell it from the rest: is_pinned() asks for a pointer's attributes.
static struct pinned{char*start;size_t size;struct pinned*next;}*pinned_list=0;
R cudaHostAlloc(void**p,size_t n,unsigned f){R rc=cudaMalloc(p,n);if(!rc){struct pinned*e=malloc(sizeof *e);e->start=*p;e->size=n;e->next=pinned_list;pinned_list=e;}return rc;}
R cudaFreeHost(void*p){struct pinned**e=&pinned_list;while(*e&&(*e)->start!=(char*)p)e=&(*e)->next;if(*e){struct pinned*gone=*e;*e=gone->next;free(gone);}free(p);return 0;}
R cudaPointerGetAttributes(struct cudaPointerAttributes*a,const void*p){memset(a,0,sizeof *a);a->type=cudaMemoryTypeUnregistered;for(struct pinned*e=pinned_list;e;e=e->next)if((char*)p>=e->start&&(char*)p<e->start+e->size){a->type=cudaMemoryTypeHost;a->hostPointer=(void*)p;}return 0;}
R cudaMemGetInfo(size_t*a,size_t*b){*a=79UL<<30;*b=80UL<<30;return 0;}
R cudaMemcpy(void*d,const void*s,size_t n,enum cudaMemcpyKind k){memcpy(d,s,n);return 0;}
R cudaMemcpyAsync(void*d,const void*s,size_t n,enum cudaMemcpyKind k,cudaStream_t t){memcpy(d,s,n);return 0;}
R cudaMemset(void*d,int v,size_t n){memset(d,v,n);return 0;}
R cudaMemsetAsync(void*d,int v,size_t n,cudaStream_t t){memset(d,v,n);return 0;}
R cudaStreamCreateWithPriority(cudaStream_t*s,unsigned f,int p){*s=(cudaStream_t)malloc(8);return 0;}
R cudaStreamIsCapturing(cudaStream_t s,enum cudaStreamCaptureStatus*c){*c=0;return 0;}
R cudaEventCreateWithFlags(cudaEvent_t*e,unsigned f){*e=(cudaEvent_t)malloc(8);return 0;}
R cudaEventCreate(cudaEvent_t*e){*e=(cudaEvent_t)malloc(8);return 0;}
R cudaEventElapsedTime(float*f,cudaEvent_t a,cudaEvent_t b){*f=1;return 0;}
R cudaDeviceGetAttribute(int*v,enum cudaDeviceAttr a,int d){*v=1;return 0;}
R cudaGetLastError(void){return 0;}
R cudaPeekAtLastError(void){return 0;}
const char*cudaGetErrorString(R e){return "stub";}
const char*cudaGetErrorName(R e){return "stub";}
static int ok(){return 0;}
static int ctxstate(int d,unsigned*f,int*a){if(f)*f=0;if(a)*a=1;return 0;}
R cudaGetDriverEntryPointByVersion(const char*s,void**p,unsigned v,unsigned long long f,enum cudaDriverEntryPointQueryResult*q){*p=strstr(s,"PrimaryCtxGetState")?(void*)ctxstate:(void*)ok;if(q)*q=cudaDriverEntryPointSuccess;return 0;}
R cudaGetDriverEntryPoint(const char*s,void**p,unsigned long long f,enum cudaDriverEntryPointQueryResult*q){return cudaGetDriverEntryPointByVersion(s,p,0,f,q);}
